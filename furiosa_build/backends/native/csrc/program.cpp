#include "program.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace furiosa {

namespace {

constexpr int64_t numbers_of_a_tensor = 4 + 2 * max_rank;

// Where a tensor begins: a buffer of the run, or the arena. The buffer of one that is not given is -1.
struct Place {
    int64_t buffer;
    int64_t offset;
};

struct PlacedTensor {
    Place place;
    Tensor tensor;
};

struct Operation {
    const Kernel* kernel;
    std::vector<PlacedTensor> operands;
    std::vector<int64_t> ints;
    std::vector<double> floats;
};

PlacedTensor decode_tensor(const int64_t* numbers) {
    PlacedTensor placed{{numbers[0], numbers[1]}, {nullptr, static_cast<DType>(numbers[2]), numbers[3], {}, {}}};
    std::memcpy(placed.tensor.shape, numbers + 4, sizeof(placed.tensor.shape));
    std::memcpy(placed.tensor.stride, numbers + 4 + max_rank, sizeof(placed.tensor.stride));
    return placed;
}

std::vector<Operation> decode(const int64_t* tensors, const int64_t* code, const int64_t* end) {
    const PlacedTensor missing{{-1, 0}, {nullptr, DType::none, 0, {}, {}}};
    std::vector<Operation> operations;
    while (code < end) {
        Operation operation;
        operation.kernel = &find_kernel(static_cast<Op>(*code++));
        for (int64_t left = *code++; left > 0; left--) {
            const int64_t index = *code++;
            operation.operands.push_back(index < 0 ? missing : decode_tensor(tensors + index * numbers_of_a_tensor));
        }
        const int64_t num_ints = *code++;
        operation.ints.assign(code, code + num_ints);
        code += num_ints;
        operation.floats.resize(static_cast<size_t>(*code++));
        for (double& number : operation.floats) std::memcpy(&number, code++, sizeof(number));
        operations.push_back(std::move(operation));
    }
    return operations;
}

// The calls of a program, for one run at a time: their tensors say where they lie in that run.
class Instance {
  public:
    explicit Instance(const std::vector<Operation>& operations) {
        for (const Operation& operation : operations) {
            for (const PlacedTensor& operand : operation.operands) {
                tensors_.push_back(operand.tensor);
                places_.push_back(operand.place);
            }
        }
        const Tensor* tensors = tensors_.data();
        for (const Operation& operation : operations) {
            const Call call{tensors,
                            static_cast<int64_t>(operation.operands.size()),
                            operation.ints.data(),
                            static_cast<int64_t>(operation.ints.size()),
                            operation.floats.data(),
                            static_cast<int64_t>(operation.floats.size())};
            for (const Kernel* kernel : {operation.kernel->preparation, operation.kernel}) {
                const int64_t jobs = kernel == nullptr ? 0 : kernel->jobs(call);
                if (jobs > 0) calls_.push_back({kernel, call, jobs});
            }
            if (operation.kernel->shared_bytes != nullptr) {
                shared_bytes_ = std::max(shared_bytes_, operation.kernel->shared_bytes(call));
            }
            tensors += call.num_tensors;
        }
    }

    // `arena_bytes`: a multiple of 64.
    void run(Pool& pool, void* const* buffers, int64_t num_buffers, size_t arena_bytes) {
        char* arena = static_cast<char*>(pool.arena(arena_bytes + shared_bytes_));
        for (PreparedCall& prepared : calls_) prepared.call.shared = arena + arena_bytes;
        for (size_t i = 0; i < places_.size(); i++) {
            const Place& place = places_[i];
            if (place.buffer < 0) continue;
            void* buffer = place.buffer < num_buffers ? buffers[place.buffer] : arena;
            tensors_[i].data = static_cast<char*>(buffer) + place.offset;
        }
        pool.run(calls_.data(), calls_.size());
    }

  private:
    std::vector<Tensor> tensors_;  // the operands of every call, one call after the other
    std::vector<Place> places_;
    std::vector<PreparedCall> calls_;
    size_t shared_bytes_ = 0;  // of the call whose jobs share the most
};

}  // namespace

}  // namespace furiosa

struct furiosa_pool {
    furiosa::Pool pool;
};

struct furiosa_program {
    furiosa_program(std::vector<furiosa::Operation> operations, int64_t num_buffers, int64_t arena_bytes)
        : operations_(std::move(operations)), num_buffers_(num_buffers), arena_bytes_((static_cast<size_t>(arena_bytes) + 63) / 64 * 64) {
        give_back(std::make_unique<furiosa::Instance>(operations_));
    }

    void run(furiosa::Pool& pool, void* const* buffers) {
        std::unique_ptr<furiosa::Instance> instance = take();
        instance->run(pool, buffers, num_buffers_, arena_bytes_);
        give_back(std::move(instance));
    }

  private:
    // There are as many instances as threads have run the program at the same time.
    std::unique_ptr<furiosa::Instance> take() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!idle_.empty()) {
                std::unique_ptr<furiosa::Instance> instance = std::move(idle_.back());
                idle_.pop_back();
                return instance;
            }
        }
        return std::make_unique<furiosa::Instance>(operations_);
    }

    void give_back(std::unique_ptr<furiosa::Instance> instance) {
        const std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(instance));
    }

    const std::vector<furiosa::Operation> operations_;
    const int64_t num_buffers_;
    const size_t arena_bytes_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<furiosa::Instance>> idle_;
};

furiosa_pool* furiosa_pool_create(int64_t threads) {
    try {
        return new furiosa_pool{furiosa::Pool(threads)};
    } catch (const std::system_error&) {
        return nullptr;
    }
}

void furiosa_pool_destroy(furiosa_pool* pool) { delete pool; }

furiosa_program* furiosa_program_create(const int64_t* tensors, int64_t num_tensors, const int64_t* code,
                                        int64_t code_length, int64_t num_buffers, int64_t arena_bytes) {
    static_cast<void>(num_tensors);
    return new furiosa_program(furiosa::decode(tensors, code, code + code_length), num_buffers, arena_bytes);
}

void furiosa_program_destroy(furiosa_program* program) { delete program; }

int64_t furiosa_program_run(furiosa_program* program, furiosa_pool* pool, void* const* buffers) {
    try {
        program->run(pool->pool, buffers);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
