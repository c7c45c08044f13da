// Memory for weights: aligned to pages, and where the system has them to huge ones.
#pragma once

#include <cstdint>

std::uint8_t* allocate(std::int64_t bytes);  // null if memory is short
void release(std::uint8_t* data, std::int64_t bytes);
