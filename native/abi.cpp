// The number that spikelm/kernels/native.py expects: raised whenever a signature changes, so that
// a library left over from an older build is refused instead of misread.

#include "common.h"

EXPORT int spikelm_abi() { return 11; }
