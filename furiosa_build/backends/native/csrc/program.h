// Programs and the threads that run them: the library's C interface. Called through ctypes by library.py.
//
// A program as int64 numbers:
//   tensors: for each tensor 20 numbers: buffer, byte offset, dtype, rank, shape[8], stride[8] (unused ones are 0)
//   code: for each call: op, count of tensors, their indices (-1: not given), count of ints, ints, count of floats,
//         the bits of the floats (double)
// Buffers are those that a run is given, in order, and then the arena (index `num_buffers`): memory of the
// pool, whose content is of no use after the run. The numbers are trusted: plan.py has checked them.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)

extern "C" {

struct furiosa_program;
struct furiosa_pool;

// A pool of `threads` threads, the calling one of a run among them. NULL when the system has no more threads.
furiosa_pool* furiosa_pool_create(int64_t threads);
void furiosa_pool_destroy(furiosa_pool*);

furiosa_program* furiosa_program_create(const int64_t* tensors, int64_t num_tensors, const int64_t* code,
                                        int64_t code_length, int64_t num_buffers, int64_t arena_bytes);
void furiosa_program_destroy(furiosa_program*);

// Runs a program on `buffers`; returns when it has ended. Several threads may run one program, each with a pool of its
// own. Returns 0, or 1 when there is no memory for the arena.
int64_t furiosa_program_run(furiosa_program*, furiosa_pool*, void* const* buffers);

// Programs that are created from now on use the kernels for less of a processor: 0 for all that this one has, 1 without
// AMX, 2 without dot products (AVX-512 alone), 3 with AVX2 alone. For tests.
void furiosa_limit_cpu(int64_t limit);

}

#pragma GCC visibility pop
