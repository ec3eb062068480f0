// Programs of a kernel that checks its surroundings, run in every way that pool.h allows: for sanitizers.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace {

constexpr int64_t num_jobs = 37, num_calls = 60;

// Job n adds one to number n, which the call before has added one to, and fills its scratch.
void add_one(const furiosa::Call& call, int64_t begin, int64_t end, furiosa::Scratch& scratch) {
    int64_t* numbers = call.tensors[0].as<int64_t>();
    for (int64_t job = begin; job < end; job++) {
        if (numbers[(job * 7) % num_jobs] < call.ints[0]) std::abort();
        std::memset(scratch.get(static_cast<size_t>(64 + job * 100)), 1, static_cast<size_t>(64 + job * 100));
    }
    for (int64_t job = begin; job < end; job++) call.tensors[1].as<int64_t>()[job] = numbers[job] + 1;
}

const furiosa::Kernel kernel{[](const furiosa::Call&) { return num_jobs; }, add_one};

// Numbers go from buffer 0 to the arena and back.
furiosa_program* make_program() {
    std::vector<int64_t> tensors, code;
    for (int64_t buffer = 0; buffer < 2; buffer++) {
        std::vector<int64_t> tensor(20);
        tensor[0] = buffer;
        tensor[2] = static_cast<int64_t>(furiosa::DType::i64);
        tensor[3] = 1;
        tensor[4] = num_jobs;
        tensor[12] = 1;
        tensors.insert(tensors.end(), tensor.begin(), tensor.end());
    }
    for (int64_t i = 0; i < num_calls; i++) {
        const int64_t call[] = {0, 2, i % 2, 1 - i % 2, 1, i, 0};
        code.insert(code.end(), std::begin(call), std::end(call));
    }
    return furiosa_program_create(tensors.data(), 2, code.data(), static_cast<int64_t>(code.size()), 1, num_jobs * 8);
}

void run(furiosa_program* program, furiosa_pool* pool) {
    std::vector<int64_t> numbers(num_jobs, 0);
    void* buffers[] = {numbers.data()};
    if (furiosa_program_run(program, pool, buffers) != 0) std::abort();
    for (const int64_t number : numbers) {
        if (number != num_calls) std::abort();
    }
}

}  // namespace

const furiosa::Kernel& furiosa::find_kernel(Op) { return kernel; }

int main() {
    furiosa_program* program = make_program();
    std::vector<std::thread> threads;
    for (int64_t size = 1; size <= 5; size++) {
        threads.emplace_back([program, size] {
            for (int round = 0; round < 3; round++) {
                furiosa_pool* pool = furiosa_pool_create(size);
                for (int i = 0; i < 20; i++) {
                    run(program, pool);
                    if (i % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(i * 20));
                }
                furiosa_pool_destroy(pool);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    furiosa_program_destroy(program);
    std::puts("fine");
}
