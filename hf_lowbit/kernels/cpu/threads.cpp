#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "threads.h"

namespace lowbit {
namespace {

// A worker spins this many times before it sleeps: some 200 us, more than the gap that the host leaves between two fused calls
// and little beside a scheduler's time slice when the machine is busy. Waking a sleeper costs 40 us, a third of a product of
// 2048 x 2048.
constexpr int kSpins = 10000;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Pool {
    std::mutex busy;                  // held by the caller being served
    std::mutex mutex;                 // guards sleeping
    std::condition_variable wake, done;
    std::vector<std::thread> workers;
    std::atomic<uint64_t> round{0};   // number of the call, and in the low byte how many workers take part
    std::atomic<int64_t> next{0};
    std::atomic<int> running{0};      // workers that have not finished their part
    int64_t count = 0, grain = 1;
    void (*work)(void*, int64_t, int64_t) = nullptr;
    void* context = nullptr;

    void drain() {
        for (;;) {
            const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
            if (first >= count) return;
            work(context, first, first + grain < count ? first + grain : count);
        }
    }

    void serve(int number, uint64_t seen) {
        for (;;) {
            uint64_t now;
            for (int spin = 0; (now = round.load(std::memory_order_acquire)) == seen; ++spin) {
                if (spin < kSpins) {
                    pause();
                    continue;
                }
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return round.load(std::memory_order_acquire) != seen; });
            }  // read again at the head of the loop
            seen = now;
            if (number >= int(now & 255)) continue;  // not wanted: the caller does not wait for this one
            drain();
            if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex);
                done.notify_one();
            }
        }
    }

    // The caller's share and those of `helpers` workers; fewer where the system gives no more threads.
    void run(int helpers) {
        try {
            while (int(workers.size()) < helpers) {
                const int number = int(workers.size());
                workers.emplace_back([this, number, seen = round.load()] { serve(number, seen); });
            }
        } catch (const std::exception&) {
            helpers = int(workers.size());
        }
        next.store(0, std::memory_order_relaxed);
        running.store(helpers, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex);
            round.store(((round.load(std::memory_order_relaxed) >> 8) + 1) << 8 | uint64_t(helpers), std::memory_order_release);
        }
        wake.notify_all();
        drain();
        for (int spin = 0; running.load(std::memory_order_acquire) != 0; ++spin) {
            if (spin < kSpins) {
                pause();
                continue;
            }
            std::unique_lock<std::mutex> lock(mutex);
            done.wait(lock, [&] { return running.load(std::memory_order_acquire) == 0; });
        }
    }
};

// Never destroyed: workers sleep in it while the process exits. After fork() the child's workers do not exist, so it takes a
// new pool; the old one, whose locks may be held by threads that are gone, is left alone.
Pool* pool = nullptr;
std::once_flag once;

void renew() { pool = new Pool; }

}  // namespace

void parallel(int64_t count, int64_t grain, int threads, void (*work)(void*, int64_t, int64_t), void* context) {
    if (count <= 0) return;
    if (grain < 1) grain = 1;
    const int64_t ranges = (count + grain - 1) / grain;
    const int helpers = int(threads < ranges ? threads : ranges) - 1;
    std::call_once(once, [] {
        renew();
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, renew);
#endif
    });
    Pool& p = *pool;
    if (helpers < 1 || !p.busy.try_lock()) {
        work(context, 0, count);
        return;
    }
    p.count = count, p.grain = grain, p.work = work, p.context = context;
    p.run(helpers < 255 ? helpers : 255);
    p.busy.unlock();
}

}  // namespace lowbit
