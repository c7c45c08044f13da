// See memory.h.

#include "memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

using std::int64_t;
using std::uint8_t;

#if defined(__linux__)

namespace {

// Matrices lie in chunks that the kernel may back with huge pages: a page table walk per row would
// cost a quarter of the bandwidth, and one matrix alone is often smaller than such a page.
constexpr int64_t HUGE_PAGE = int64_t{1} << 21, CHUNK = int64_t{1} << 26, ALIGNMENT = 4096;

struct Chunk {
    uint8_t* base;  // aligned to a huge page
    int64_t size, used, matrices;
    void* mapping;
    std::size_t mapped;
};

std::mutex chunks_mutex;
// Never destroyed: matrices may outlive static objects when Python exits.
std::vector<Chunk>& chunks = *new std::vector<Chunk>;

int64_t aligned(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

uint8_t* allocate(int64_t bytes) {
    bytes = std::max(aligned(bytes, ALIGNMENT), ALIGNMENT);
    const std::lock_guard lock(chunks_mutex);
    for (Chunk& chunk : chunks)
        if (chunk.size - chunk.used >= bytes) {
            uint8_t* data = chunk.base + chunk.used;
            chunk.used += bytes;
            ++chunk.matrices;
            return data;
        }
    const int64_t size = std::max(aligned(bytes, HUGE_PAGE), CHUNK);
    const std::size_t mapped = size + HUGE_PAGE;
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    auto* base = reinterpret_cast<uint8_t*>(
        aligned(reinterpret_cast<std::intptr_t>(mapping), HUGE_PAGE));
    madvise(base, size, MADV_HUGEPAGE);  // without it everything works, slower
    chunks.push_back({base, size, bytes, 1, mapping, mapped});
    return base;
}

void release(uint8_t* data, int64_t bytes) {
    const std::lock_guard lock(chunks_mutex);
    const auto chunk = std::find_if(chunks.begin(), chunks.end(), [&](const Chunk& c) {
        return data >= c.base && data < c.base + c.size;
    });
    if (--chunk->matrices == 0) {
        munmap(chunk->mapping, chunk->mapped);
        chunks.erase(chunk);
        return;
    }
    // The address range waits for the chunk's other matrices, the memory does not.
    const int64_t begin = aligned(data - chunk->base, HUGE_PAGE);
    const int64_t end = (data - chunk->base + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (end > begin) madvise(chunk->base + begin, end - begin, MADV_DONTNEED);
}

#else

static constexpr std::align_val_t ALIGNMENT{4096};

uint8_t* allocate(int64_t bytes) {
    return static_cast<uint8_t*>(::operator new(bytes, ALIGNMENT, std::nothrow));
}

void release(uint8_t* data, int64_t) { ::operator delete(data, ALIGNMENT); }

#endif
