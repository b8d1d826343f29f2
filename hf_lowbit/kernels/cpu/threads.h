// A small pool of worker threads shared by all calls of the process.
#pragma once
#include <cstdint>
#include <type_traits>

namespace lowbit {

// Run work(context, first, last) over ranges that cover 0 .. count, on the caller and up to threads - 1 workers.
//
// Ranges are handed out from one counter, so a core that is busy elsewhere gets fewer of them. Each index is worked on by
// one thread, whatever the number of threads. If the pool is serving another caller the whole range runs on the caller:
// two Python threads never wait for each other. A child of fork() starts without workers and makes its own.
void parallel(int64_t count, int64_t grain, int threads, void (*work)(void*, int64_t, int64_t), void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, int threads, F&& f) {
    using Body = typename std::remove_reference<F>::type;
    parallel(count, grain, threads, [](void* c, int64_t a, int64_t b) { (*static_cast<Body*>(c))(a, b); }, &f);
}

}  // namespace lowbit
