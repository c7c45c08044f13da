#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace {

constexpr int MOST = 256;

using Clock = std::chrono::steady_clock;
constexpr auto SPIN = std::chrono::microseconds(40), YIELD = std::chrono::microseconds(1000);

inline void pause() {
#if defined(__x86_64__) && defined(__GNUC__)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    asm volatile("yield");
#endif
}

// Returns true as soon as `done()`; false if a millisecond of spinning and yielding did not help. A
// thread that only spins would keep the one it waits for from running on a busy machine.
template <typename Done>
bool wait_briefly(const Done& done) {
    const auto start = Clock::now();
    for (auto waited = Clock::duration::zero(); waited < YIELD; waited = Clock::now() - start) {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            pause();
        }
        if (waited > SPIN) std::this_thread::yield();
    }
    return false;
}

struct alignas(64) Claim {
    std::atomic<std::uint64_t> job{0};
};

struct Pool {
    // Number of the job in the high bits, its parts in the low 16. A part belongs to the thread that
    // first writes the job into its claim; only a job with unclaimed parts is unfinished, so whoever
    // claims one may read the fields below.
    alignas(64) std::atomic<std::uint64_t> job{0};
    void (*task)(void*, int, int) = nullptr;
    void* context = nullptr;
    alignas(64) std::atomic<int> remaining{0};
    alignas(64) std::atomic<bool> busy{false};
    int workers = 0;
    Claim claims[MOST];

    bool claim(int part, std::uint64_t now) {
        std::uint64_t last = claims[part].job.load(std::memory_order_relaxed);
        return last < now && claims[part].job.compare_exchange_strong(last, now);
    }

    [[noreturn]] void work(int part, std::uint64_t seen) {
        for (;;) {
            const auto changed = [&] { return job.load(std::memory_order_acquire) != seen; };
            while (!wait_briefly(changed)) job.wait(seen);
            seen = job.load(std::memory_order_acquire);
            const int parts = static_cast<int>(seen & 0xffff);
            if (part >= parts || !claim(part, seen)) continue;
            task(context, part, parts);
            remaining.fetch_sub(1, std::memory_order_release);
        }
    }

    // Workers for the parts from 1 on; fewer if the system gives no more threads.
    void start(int wanted) {
        try {
            for (; workers < wanted; ++workers)
                std::thread(&Pool::work, this, workers + 1, job.load()).detach();
        } catch (const std::system_error&) {
        }
    }

    void run(void (*work)(void*, int, int), void* argument, int parts) {
        start(parts - 1);
        task = work;
        context = argument;
        remaining.store(parts, std::memory_order_relaxed);
        const std::uint64_t now = ((job.load(std::memory_order_relaxed) >> 16) + 1) << 16 |
                                  static_cast<std::uint64_t>(parts);
        job.store(now);
        job.notify_all();
        for (int part = 0; part < parts; ++part)
            if (claim(part, now)) {
                work(argument, part, parts);
                remaining.fetch_sub(1, std::memory_order_relaxed);
            }
        const auto done = [&] { return remaining.load(std::memory_order_acquire) == 0; };
        while (!wait_briefly(done)) std::this_thread::yield();
    }
};

std::atomic<int> wanted_threads{1};

// Never destroyed: its threads run until the process ends.
std::atomic<Pool*>& pool() {
    static std::atomic<Pool*> current = [] {
#if defined(__unix__) || defined(__APPLE__)
        // A forked process has none of the threads.
        pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
#endif
        return new Pool;
    }();
    return current;
}

}  // namespace

int threads() { return wanted_threads.load(std::memory_order_relaxed); }

void set_threads(int n) { wanted_threads = std::clamp(n, 1, MOST); }

void parallel(void (*task)(void* context, int part, int parts), void* context, int parts_wanted) {
    const int parts = std::min(parts_wanted, threads());
    if (parts > 1) {
        Pool& here = *pool();
        if (!here.busy.exchange(true, std::memory_order_acquire)) {
            here.run(task, context, parts);
            here.busy.store(false, std::memory_order_release);
            return;
        }
    }
    task(context, 0, 1);
}
