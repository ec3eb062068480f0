// Threads that go through a list of calls together.
//
// The jobs of a call are handed out by an atomic counter. A thread that finds none left waits until the call is done: it
// spins a little, then sleeps. No call needs all threads: where other work has the cores, those that run do all the jobs,
// and a thread that comes late goes on where the others are.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"

namespace furiosa {

// A call with its kernel and the number of its jobs, at least 1.
struct PreparedCall {
    const Kernel* kernel;
    Call call;
    int64_t jobs;
};

// A number that threads wait on.
class alignas(64) Signal {
  public:
    uint32_t get() const { return value_.load(); }
    void set(uint32_t value);
    // Adds to the number, and returns what it was.
    uint32_t add(uint32_t summand);
    // Returns what the number is as soon as it is not `value`.
    uint32_t wait_while(uint32_t value);

  private:
    void wake();

    std::atomic<uint32_t> value_{0};
    std::atomic<uint32_t> sleepers_{0};
};

class Pool {
  public:
    // Throws std::system_error when the system has no more threads.
    explicit Pool(int64_t threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Runs the calls in order; the calling thread is one of the pool's. Throws std::bad_alloc.
    void run(const PreparedCall* calls, size_t count);
    // Memory of the calling thread for one run. Throws std::bad_alloc.
    void* arena(size_t bytes) { return arena_.get(bytes); }

  private:
    struct Progress {
        std::atomic<int64_t> next{0};  // the first job that nobody has taken
        std::atomic<int64_t> done{0};
    };

    void work();
    void go_through(Scratch& scratch);
    int64_t take_jobs(uint32_t number, Scratch& scratch);
    void stop();

    std::vector<std::thread> workers_;
    Scratch scratch_;
    Scratch arena_;
    int process_;  // that the workers are in: a fork does not have them

    // The run at hand.
    const PreparedCall* calls_ = nullptr;
    uint32_t count_ = 0;
    std::unique_ptr<Progress[]> progress_;
    size_t capacity_ = 0;
    std::atomic<bool> no_memory_{false};

    Signal runs_;    // odd while workers may join a run
    Signal inside_;  // workers that look at the run at hand
    Signal done_;    // calls of the run at hand that are done
    std::atomic<bool> stopping_{false};
};

}  // namespace furiosa
