"""Train the quickstart model: a small Llama that writes like Jane Austen.

What it does, on the CPU and with a fixed seed:

1. reads ``text.txt.xz`` (the six novels without the held-out chapters, 3.9 MB of text);
2. trains a byte-level BPE tokenizer of 2048 entries on it;
3. trains a ``transformers.LlamaForCausalLM`` of 2.75 million parameters (hidden size 256,
   4 layers, 8 query heads over 2 key/value heads, tied embeddings) on random windows of the
   text with AdamW and a cosine schedule: windows of 256 tokens, and of 1024 tokens for the
   last 15 % of the steps so that the whole context of 1024 is of use;
4. writes ``model/`` in the Hugging Face layout, weights in bfloat16;
5. loads ``model/`` again and prints its loss on ``heldout.txt`` and a few samples.

How long, and what comes out: see ``README.md`` beside this file.  The same machine, library
versions, ``--steps`` and ``--seed`` give the same files, byte for byte.

    python train.py                        # the published model
    python train.py --steps 50 --out small  # a quick look
    python train.py --make-text .../janeaustenr/data/Rdata.rdb  # make the text files again

Needs torch, transformers (5 or later), tokenizers and safetensors; ``--make-text`` needs nothing.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import struct
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"  # before and after every chapter: begin and end of text in one
PAD = "<|pad|>"
VOCAB = 2048
CONTEXT = 1024
WINDOW = 256
LONG_SHARE = 0.15  # share of the steps, the last ones, that see windows of CONTEXT tokens
PROMPTS = (
    "It was a truth",
    "Emma could not help",
    '"My dear Mr. Darcy," said',
)


# The text ------------------------------------------------------------------------------------


def read_novels(rdb: Path) -> list[list[str]]:
    """The lines of each novel in janeaustenr's ``Rdata.rdb``.

    The file is a row of R objects, each one a length in four bytes and a zlib stream that holds a
    character vector in R's binary (XDR) serialization, version 3.
    """
    novels = []
    rest = rdb.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        raw = stream.decompress(rest[4:])
        rest = stream.unused_data
        if raw[:2] != b"X\n":
            raise ValueError(f"{rdb}: not an R object in XDR form")
        at = 18 + struct.unpack_from(">i", raw, 14)[0]  # after the versions and the encoding's name
        kind, count = struct.unpack_from(">ii", raw, at)
        if kind & 0xFF != 16:
            raise ValueError(f"{rdb}: R type {kind & 0xFF}, expected a character vector (16)")
        at += 8
        lines = []
        for _ in range(count):
            size = struct.unpack_from(">i", raw, at + 4)[0]
            lines.append(raw[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        novels.append(lines)
    return novels


def clean_chapters(lines: list[str]) -> list[str]:
    """A novel's chapters, one paragraph to a line; titles, headings and notes are left out."""
    heading = re.compile(r"(chapter|volume) ([ivxl]+|\d+)\.?", re.IGNORECASE)
    ending = re.compile(r"finis|the end|a note on the text|\*vide .*", re.IGNORECASE)
    chapters: list[list[str]] = []
    paragraph: list[str] = []
    for line in map(str.strip, [*lines, ""]):
        if ending.fullmatch(line):
            break
        is_heading = heading.fullmatch(line) is not None
        if line and not is_heading:
            paragraph.append(line)
            continue
        text = re.sub(r"\s+", " ", " ".join(paragraph).replace("_", "").replace("*", "")).strip()
        paragraph = []
        if text and chapters and not text.startswith("["):
            chapters[-1].append(text)
        if is_heading:
            chapters.append([])
    return ["\n".join(chapter) for chapter in chapters if chapter]


def make_text(rdb: Path, out: Path) -> None:
    """Write ``text.txt.xz`` and ``heldout.txt``: chapters apart by an empty line."""
    chapters = [chapter for novel in read_novels(rdb) for chapter in clean_chapters(novel)]
    held: list[int] = []
    size = 0
    for index in random.Random(0).sample(range(len(chapters)), len(chapters)):
        length = len(chapters[index].encode())
        if size < 24_000 and size + length <= 40_000:
            held.append(index)
            size += length
    kept = [chapter for index, chapter in enumerate(chapters) if index not in held]
    held_out = [chapters[index] for index in sorted(held)]
    (out / "heldout.txt").write_bytes(("\n\n".join(held_out) + "\n").encode())
    data = ("\n\n".join(kept) + "\n").encode()
    (out / "text.txt.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(f"text.txt.xz: {len(kept)} chapters, {len(data)} bytes of text")
    print(f"heldout.txt: {len(held_out)} chapters, {size} bytes of text")


# The tokenizer -------------------------------------------------------------------------------


def train_tokenizer(chapters: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise RuntimeError(f"the vocabulary has {tokenizer.get_vocab_size()} entries, not {VOCAB}")
    return tokenizer


def encode(tokenizer: Tokenizer, chapters: list[str]) -> torch.Tensor:
    """All chapters as one row of ids, END before the first, between them and after the last."""
    import torch

    end = tokenizer.token_to_id(END)
    ids = [end]
    for chapter in tokenizer.encode_batch(chapters):
        ids += chapter.ids
        ids.append(end)
    return torch.tensor(ids)


# The model -----------------------------------------------------------------------------------


def new_model() -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def token_loss(model: LlamaForCausalLM, windows: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross entropy, in nats, of every token of the windows but the first of each."""
    from torch.nn import functional

    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction=reduction)


def mean_loss(model: LlamaForCausalLM, ids: torch.Tensor, window: int) -> float:
    """Nats per token over ``ids`` in windows side by side; each token but the first counts once."""
    import torch

    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window + 1]
            total += token_loss(model, piece[None], "sum").item()
    return total / (len(ids) - 1)


def train(model: LlamaForCausalLM, ids: torch.Tensor, held: torch.Tensor, args: argparse.Namespace) -> None:
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warmup = min(100, args.steps // 10 + 1)
    choose = torch.Generator().manual_seed(args.seed)
    started = time.monotonic()
    recent: list[float] = []
    for step in range(args.steps):
        progress = max(0.0, (step - warmup) / max(1, args.steps - warmup))
        scale = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(scale, 0.01)
        window = WINDOW if step < args.steps * (1 - LONG_SHARE) else CONTEXT
        starts = torch.randint(len(ids) - window, (args.tokens // window,), generator=choose)
        batch = torch.stack([ids[start : start + window + 1] for start in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            loss = token_loss(model, batch, "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - started
            line = f"step {step + 1}/{args.steps}  loss {sum(recent) / len(recent):.3f}"
            if (step + 1) % 500 == 0:
                line += f"  held-out {mean_loss(model, held, WINDOW):.3f}"
            print(f"{line}  {seconds:.0f} s", flush=True)
            recent = []


# The result ----------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written 0600
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    # transformers 5 writes a class name that earlier ones lack; this one all of them know.
    path = out / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")


def report(out: Path, chapters: list[str], held: list[str]) -> None:
    """Load what was saved, as a user would, and print figures and samples."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = encode(tokenizer.backend_tokenizer, held)
    train_ids = encode(tokenizer.backend_tokenizer, chapters)[: 64 * 512 + 1]
    size = len("\n".join(held).encode())
    figures: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_bytes": size,
        "heldout_tokens": len(ids),
        "train_loss_512": round(mean_loss(model, train_ids, 512), 4),
    }
    for window in (256, 512, 1024):
        loss = mean_loss(model, ids, window)
        figures[f"heldout_loss_{window}"] = round(loss, 4)
        figures[f"heldout_bits_per_byte_{window}"] = round(loss * (len(ids) - 1) / math.log(2) / size, 4)
    print(json.dumps(figures, indent=2))
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        for name, options in (
            ("greedy", {"do_sample": False, "temperature": None, "top_p": None}),
            ("temperature 0.7", {"do_sample": True}),
        ):
            torch.manual_seed(0)
            text = tokenizer.decode(model.generate(**inputs, max_new_tokens=120, **options)[0])
            print(f"\n--- {name}: {text}")


def read_chapters(text: str) -> list[str]:
    return text.strip("\n").split("\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quickstart model.")
    parser.add_argument("--steps", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=2048, help="per step; default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 matrix products (for CPUs without them)")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="default: model/")
    parser.add_argument("--report", action="store_true", help="only print the figures of --out")
    parser.add_argument("--make-text", type=Path, metavar="RDB", help="only make the text files, from this file")
    args = parser.parse_args()
    if args.make_text:
        make_text(args.make_text, HERE)
        return

    import torch

    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    chapters = read_chapters(lzma.decompress((HERE / "text.txt.xz").read_bytes()).decode())
    held = read_chapters((HERE / "heldout.txt").read_text(encoding="utf-8"))
    if not args.report:
        started = time.monotonic()
        tokenizer = train_tokenizer(chapters)
        ids = encode(tokenizer, chapters)
        model = new_model()
        epochs = args.steps * args.tokens / len(ids)
        print(
            f"{sum(map(len, chapters))} characters, {len(ids)} tokens,"
            f" {model.num_parameters()} parameters, {epochs:.1f} epochs",
            flush=True,
        )
        train(model, ids, encode(tokenizer, held), args)
        save(model, tokenizer, args.out)
        print(f"trained in {(time.monotonic() - started) / 60:.1f} minutes")
    report(args.out, chapters, held)


if __name__ == "__main__":
    main()
