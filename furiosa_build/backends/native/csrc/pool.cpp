#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <new>

namespace furiosa {

namespace {

constexpr auto spin_time = std::chrono::microseconds(50);
constexpr int pauses_between_looks_at_the_clock = 32;
constexpr int64_t shares_of_a_thread = 4;

// How many jobs a thread takes at a time: a share of those that are left, so that taking them is cheap at first, and all
// threads end together.
int64_t share(int64_t left, size_t threads) {
    return std::max<int64_t>(1, left / (static_cast<int64_t>(threads) * shares_of_a_thread));
}

}  // namespace

Scratch::~Scratch() { std::free(memory_); }

void* Scratch::get(size_t bytes) {
    if (bytes > bytes_) {
        std::free(memory_);
        bytes_ = 0;
        memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (memory_ == nullptr) throw std::bad_alloc();
        bytes_ = bytes;
    }
    return memory_;
}

// Who waits says so before it looks at the number a last time, and who changes the number does so before it looks for
// sleepers: one of the two sees the other.
void Signal::set(uint32_t value) {
    value_.store(value);
    wake();
}

uint32_t Signal::add(uint32_t summand) {
    const uint32_t before = value_.fetch_add(summand);
    wake();
    return before;
}

void Signal::wake() {
    if (sleepers_.load() > 0) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

uint32_t Signal::wait_while(uint32_t value) {
    uint32_t found = value_.load();
    if (found != value) return found;
    const auto end = std::chrono::steady_clock::now() + spin_time;
    do {
        for (int i = 0; i < pauses_between_looks_at_the_clock; i++) {
            _mm_pause();
            found = value_.load();
            if (found != value) return found;
        }
    } while (std::chrono::steady_clock::now() < end);
    sleepers_.fetch_add(1);
    while ((found = value_.load()) == value) {
        syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
    }
    sleepers_.fetch_sub(1);
    return found;
}

Pool::Pool(int64_t threads) : process_(getpid()) {
    try {
        for (int64_t i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    if (getpid() != process_) {
        // A fork has no workers: there is nothing to join, and nothing that may be ended.
        new std::vector<std::thread>(std::move(workers_));
        return;
    }
    stopping_.store(true);
    runs_.add(2);
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
}

void Pool::run(const PreparedCall* calls, size_t count) {
    if (count > capacity_) {
        progress_.reset(new Progress[count]);
        capacity_ = count;
    }
    for (size_t i = 0; i < count; i++) {
        progress_[i].next.store(0, std::memory_order_relaxed);
        progress_[i].done.store(0, std::memory_order_relaxed);
    }
    calls_ = calls;
    count_ = static_cast<uint32_t>(count);
    no_memory_.store(false);
    done_.set(0);
    runs_.add(1);
    go_through(scratch_);
    runs_.add(1);
    for (uint32_t inside = inside_.get(); inside != 0;) inside = inside_.wait_while(inside);
    if (no_memory_.load()) throw std::bad_alloc();
}

void Pool::work() {
    Scratch scratch;
    uint32_t seen = 0;
    while (!stopping_.load()) {
        const uint32_t run = runs_.get();
        if (run % 2 == 1 && run != seen) {
            inside_.add(1);
            if (runs_.get() == run) go_through(scratch);
            inside_.add(-1);
            seen = run;
        }
        if (!stopping_.load()) runs_.wait_while(run);
    }
}

void Pool::go_through(Scratch& scratch) {
    for (uint32_t number = done_.get(); number < count_;) {
        const int64_t taken = take_jobs(number, scratch);
        if (taken > 0 && progress_[number].done.fetch_add(taken) + taken == calls_[number].jobs) done_.set(number + 1);
        number = done_.wait_while(number);
    }
}

int64_t Pool::take_jobs(uint32_t number, Scratch& scratch) {
    const PreparedCall& prepared = calls_[number];
    std::atomic<int64_t>& next = progress_[number].next;
    int64_t taken = 0;
    while (true) {
        int64_t begin = next.load(), end = 0;
        do {
            if (begin == prepared.jobs) return taken;
            end = begin + share(prepared.jobs - begin, workers_.size() + 1);
        } while (!next.compare_exchange_weak(begin, end));
        try {
            prepared.kernel->run(prepared.call, begin, end, scratch);
        } catch (const std::bad_alloc&) {
            no_memory_.store(true);
        }
        taken += end - begin;
    }
}

}  // namespace furiosa
