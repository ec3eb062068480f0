// paged_attention and join_attention.
#include "attention.h"

#include "attention_tiles.h"

namespace furiosa::FURIOSA_VARIANT {

namespace {

// ---- paged_attention: see attention.h and attention_tiles.h

int64_t attention_jobs(const Call& call) { return Attention(call).jobs(); }

template <class Arithmetic>
void attend(const Attention& attention, int64_t begin, int64_t end, Scratch& scratch) {
    Share share = attention.share(begin);
    for (int64_t job = begin; job < end; job++) {
        const Share next = job + 1 < end ? attention.share(job + 1) : Share{};
        Job<Arithmetic>(attention, share, scratch).run(next);
        share = next;
    }
}

void run_attention(const Call& call, int64_t begin, int64_t end, Scratch& scratch) {
    const Attention attention(call);
#ifdef __AVX512BF16__
    const auto fits = [](DType dtype) { return dtype == DType::bf16 || has_codes(dtype); };
    if (attention.query.dtype == DType::bf16 && fits(attention.keys.dtype) && fits(attention.values.dtype))
        return attend<Pairs>(attention, begin, end, scratch);
#endif
    attend<Single>(attention, begin, end, scratch);
}

// ---- join_attention: partial [batch, chunks, tokens, heads, size + 2], sinks?, out [batch, tokens, heads, size]

// A job is a head of a token.
int64_t join_jobs(const Call& call) {
    const Tensor& out = call.tensors[2];
    return out.shape[0] * out.shape[1] * out.shape[2];
}

void join(const Tensor& partial, const Tensor& sinks, const Tensor& out, int64_t sequence, int64_t token, int64_t head) {
    const int64_t size = out.shape[3], chunks = partial.shape[1];
    const float* parts = partial.as<float>() + sequence * partial.stride[0] + token * partial.stride[2];
    parts += head * partial.stride[3];
    const auto part = [&](int64_t chunk) { return parts + chunk * partial.stride[1]; };
    float largest = -infinity, sum = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) largest = part(chunk)[size] > largest ? part(chunk)[size] : largest;
    const float zero = largest == -infinity ? 0 : largest;
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        sum += part(chunk)[size + 1] * power_of_two(part(chunk)[size] - zero);
    const Normalizer normalizer(sinks, head, largest, sum);
    const int64_t offset = sequence * out.stride[0] + token * out.stride[1] + head * out.stride[2];
    char* to = out.as<char>() + offset * bytes_of(out.dtype);
    for (int64_t at = 0; at < size; at += lanes) {
        Floats output{};
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            if (part(chunk)[size + 1] == 0) continue;  // nothing of it is attended to
            const float* numbers = part(chunk);
            const Floats own = load_part<Floats>(reinterpret_cast<const char*>(numbers + at), (size - at) * 4);
            output += own * power_of_two(numbers[size] - zero);
        }
        write(to, out.dtype, size, at, normalizer.applied(output));
    }
}

void run_join(const Call& call, int64_t begin, int64_t end, Scratch&) {
    const Tensor &partial = call.tensors[0], &sinks = call.tensors[1], &out = call.tensors[2];
    for (int64_t job = begin; job < end; job++) {
        const int64_t head = job % out.shape[2], row = job / out.shape[2];
        join(partial, sinks, out, row / out.shape[1], row % out.shape[1], head);
    }
}

}  // namespace

extern const Kernel paged_attention{attention_jobs, run_attention};
extern const Kernel join_attention{join_jobs, run_join};

}  // namespace furiosa::FURIOSA_VARIANT
