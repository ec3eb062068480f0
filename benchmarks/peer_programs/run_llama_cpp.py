"""llama.cpp, by llama-cpp-python's low-level calls. Formats: bf16, q8_0 and q4_0, by its own quantizer."""

import ctypes
import json
import struct
from pathlib import Path

import gguf
import llama_cpp
import numpy
from common import THREADS, Generate, Task, main

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TYPES = {"bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
TYPES["q4_0"] = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0


def prepare(task: Task) -> None:
    """A GGUF file of the numbers as they are (rows of queries and keys are not reordered: only speed counts here)."""
    config = json.loads((task.model / "config.json").read_text())
    whole = task.work / "bf16.gguf"
    writer = gguf.GGUFWriter(whole, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, json.loads((task.model / "tokenizer.json").read_text()))
    for name, dtype, shape, data in tensors(task.model / "model.safetensors"):
        if len(shape) == 1:  # norms are float32
            data, dtype = (data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32), "F32"
        raw = gguf.GGMLQuantizationType.BF16 if dtype == "BF16" else None
        writer.add_tensor(gguf_name(name), data.view(numpy.uint8) if raw else data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if task.format != "bf16":
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = TYPES[task.format], THREADS
        status = llama_cpp.llama_model_quantize(
            str(whole).encode(), str(task.work / f"{task.format}.gguf").encode(), ctypes.byref(params)
        )
        assert status == 0
        whole.unlink()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    """A BPE whose pieces of text are those of GPT-2."""
    special = {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    vocabulary = {**tokenizer["model"]["vocab"], **special}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    merges = [one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def tensors(path: Path):
    """What a safetensors file holds."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = numpy.memmap(path, mode="r", offset=8 + length)
    for name, one in header.items():
        if name != "__metadata__":
            begin, end = one["data_offsets"]
            yield name, one["dtype"], one["shape"], data[begin:end].view(numpy.uint16).reshape(one["shape"])


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"


def load(task: Task) -> Generate:
    llama_cpp.llama_backend_init()
    network = llama_cpp.llama_model_load_from_file(
        str(task.work / f"{task.format}.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    assert network
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(network))

    def generate(prompts, steps):
        batch, tokens = len(prompts), len(prompts[0])
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = batch * (tokens + steps + 2), max(tokens, batch), batch
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = THREADS
        context = llama_cpp.llama_init_from_model(network, params)
        assert context
        feed = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

        def run(rows):
            feed.n_tokens = len(rows)
            for i, (token, place, sequence, wanted) in enumerate(rows):
                feed.token[i], feed.pos[i], feed.n_seq_id[i], feed.logits[i] = token, place, 1, wanted
                feed.seq_id[i][0] = sequence
            assert llama_cpp.llama_decode(context, feed) == 0
            return [argmax(i) for i, row in enumerate(rows) if row[3]]

        def argmax(i):
            logits = llama_cpp.llama_get_logits_ith(context, i)
            return int(numpy.ctypeslib.as_array(logits, (vocabulary,)).argmax())

        last = []
        for sequence, prompt in enumerate(prompts):
            last += run([(token, i, sequence, i == tokens - 1) for i, token in enumerate(prompt)])
        yield
        for step in range(steps):
            last = run([(token, tokens + step, sequence, True) for sequence, token in enumerate(last)])
            yield
        llama_cpp.llama_batch_free(feed)
        llama_cpp.llama_free(context)

    return generate


main(load, prepare)
