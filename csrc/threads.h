// Work shared among threads: those of the OpenMP library that torch has loaded, where there is one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

using Gomp = void (*)(void (*)(void *), void *, unsigned, unsigned);

// The entry that compilers call for `#pragma omp parallel` (libgomp's, and libomp's for its sake), if it is in the process. After an op of
// torch its workers keep spinning for a while: threads of our own would have to share their cores, and those two may not be linked together.
inline Gomp openmp() {
#if defined(__unix__) || defined(__APPLE__)
    static const auto found = reinterpret_cast<Gomp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

// Calls f(part) for every part of [0, parts), the next one that is left by whichever of `threads` threads is free; f must not throw nor
// touch Python.
template <typename F> void each_part(int64_t parts, int64_t threads, F f) {
    threads = std::max<int64_t>(1, std::min(threads, parts));
    struct Job {
        F &f;
        int64_t parts;
        std::atomic<int64_t> next{0};
    } job{f, parts};
    const auto work = [](void *data) {
        Job &job = *static_cast<Job *>(data);
        for (int64_t part; (part = job.next++) < job.parts;) job.f(part);
    };
    if (threads > 1 && openmp()) return openmp()(work, &job, unsigned(threads), 0);
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, &job);
    work(&job);
    for (auto &other : others) other.join();
}
