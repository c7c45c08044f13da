// Persistent threads for work of microseconds.
#pragma once

// How many threads `parallel` may use, the caller included: 1 until `set_threads` (at most 256).
int threads();
void set_threads(int n);

// task(context, part, parts) for every part below parts = min(parts_wanted, threads()), at the same
// time; the caller takes part 0, and parts whose thread does not wake in time. Returns when all are
// done. While other calls are under way it runs as one part, so parts must not wait for each other.
void parallel(void (*task)(void* context, int part, int parts), void* context, int parts_wanted);
