"""Writes a random checkpoint of a published model's shape: for benchmarks, where weights are noise.

    target/venv/bin/python scripts/fixtures.py --shape llama-3.2-1b --out target/models/llama-1b
    target/venv/bin/python scripts/fixtures.py --shape llama-3.1-70b --layers 4 --out DIR
    target/venv/bin/python scripts/fixtures.py --shape custom --config config.json --out DIR

bf16, in files of about a gigabyte with an index. Tensors are made and written one by one, so that
memory stays at the size of the largest tensor's piece, whatever the model's size.

The tokenizer and chat template of the built-in model are copied in where `coordinator/builtin` has
them. Its vocabulary is smaller than these models': every id above it is a word of its own, so that a
random model's tokens are text that can be seen as each is sampled.

Not for correctness tests: there is no reference output here, see `fixtures.py`.

Invariant: names and shapes of the tensors are those that `transformers` gives the configuration.
"""

import json
import math
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = ROOT / "coordinator" / "builtin"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

FILE_BYTES = 1 << 30
# Values drawn at a time: 64 MiB of f32.
PIECE = 1 << 24

LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def shape(architecture, hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    """A configuration in the older dialect, which is what most published files are written in."""
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5 if architecture in ("Llama", "Mistral") else 1e-6,
        "rope_theta": 500000.0 if architecture == "Llama" else 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


def llama3(*sizes, factor=8.0, **more):
    scaling = LLAMA3_SCALING | {"factor": factor}
    limit = {"max_position_embeddings": 131072, "rope_scaling": scaling}
    return shape("Llama", *sizes, 128256, **limit, **more)


def gemma(version, *sizes, **more):
    """Gemma's files say nothing of tied embeddings, and name the activation by another key."""
    model_type = {2: "gemma2", 3: "gemma3_text"}[version]
    config = shape(f"Gemma{version}", *sizes, head_dim=256, attention_bias=False, **more)
    config |= {"model_type": model_type, "hidden_activation": "gelu_pytorch_tanh"}
    unsaid = ("hidden_act", "tie_word_embeddings")
    return {key: value for key, value in config.items() if key not in unsaid}


TIED = {"tie_word_embeddings": True}
OWN_HEAD = {"head_dim": 128, "attention_bias": False}

SHAPES = {
    "llama-3.2-1b": llama3(2048, 8192, 16, 32, 8, factor=32.0, head_dim=64, **TIED),
    "llama-3.2-3b": llama3(3072, 8192, 28, 24, 8, factor=32.0, head_dim=128, **TIED),
    "llama-3.1-8b": llama3(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": llama3(8192, 28672, 80, 64, 8),
    "mistral-7b": shape("Mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None),
    "qwen2.5-0.5b": shape("Qwen2", 896, 4864, 24, 14, 2, 151936, **TIED),
    "qwen2.5-1.5b": shape("Qwen2", 1536, 8960, 28, 12, 2, 151936, **TIED),
    "qwen2.5-7b": shape("Qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen3-0.6b": shape("Qwen3", 1024, 3072, 28, 16, 8, 151936, **TIED, **OWN_HEAD),
    "qwen3-8b": shape("Qwen3", 4096, 12288, 36, 32, 8, 151936, **OWN_HEAD),
    "gemma-2-2b": gemma(2, 2304, 9216, 26, 8, 4, 256000, rope_theta=10000.0, sliding_window=4096),
    "gemma-2-9b": gemma(2, 3584, 14336, 42, 16, 8, 256000, rope_theta=10000.0, sliding_window=4096),
    "gemma-3-1b": gemma(3, 1152, 6912, 26, 4, 1, 262144, sliding_window=512),
}


def configuration(arguments):
    if arguments.shape == "custom":
        config = json.loads(arguments.config.read_text())
    elif arguments.shape in SHAPES:
        config = dict(SHAPES[arguments.shape])
    else:
        sys.exit(f"no shape {arguments.shape!r}: custom, {', '.join(SHAPES)}")
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
        # A list with one entry for each layer no longer fits.
        config.pop("layer_types", None)
    config.pop("dtype", None)
    return config | {"torch_dtype": "bfloat16"}


def parameter_shapes(folder):
    """Names and shapes in the model's own order, read from a model without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def scale_of(name, dims, is_gemma):
    """Mean and deviation that keep activations near unit size through any number of layers."""
    if name.endswith("norm.weight"):
        # Gemma stores the distance from 1.
        return (0.0 if is_gemma else 1.0), 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, 0.1
    return 0.0, 1.0 / math.sqrt(dims[-1])


def write_values(out, name, dims, is_gemma, random):
    """Draw one tensor and append it as bf16, a piece at a time."""
    mean, deviation = scale_of(name, dims, is_gemma)
    left = math.prod(dims)
    while left:
        values = random.standard_normal(min(left, PIECE), dtype=np.float32)
        values *= deviation
        values += mean
        # The upper half of an f32 is a bf16, rounded towards zero: good enough for noise.
        out.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
        left -= values.size


def write_file(path, tensors, is_gemma, random):
    """One safetensors file: length of the header, header, values in the header's order."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, dims in tensors:
        end = offset + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for name, dims in tensors:
            write_values(out, name, dims, is_gemma, random)


def split(tensors):
    """Consecutive groups of at most `FILE_BYTES`, or of one tensor where that alone is larger."""
    groups, size = [[]], 0
    for name, dims in tensors:
        bytes_ = 2 * math.prod(dims)
        if groups[-1] and size + bytes_ > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, dims))
        size += bytes_
    return groups


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def fill_vocabulary(path, size):
    """Gives each id that the tokenizer does not know a word that no text is split into."""
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = set(vocabulary.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= {f"\u0120w{number}": number for number in range(size) if number not in known}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")


def copy_tokenizer(out, size):
    """The built-in model's tokenizer with `size` tokens, and its special ids, if it has been made."""
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    if (BUILTIN / "tokenizer.json").exists():
        for name in TOKENIZER_FILES:
            if (BUILTIN / name).exists():
                shutil.copy(BUILTIN / name, out)
        fill_vocabulary(out / "tokenizer.json", size)
        if (BUILTIN / "generation_config.json").exists():
            generation = json.loads((BUILTIN / "generation_config.json").read_text())
    else:
        print("coordinator/builtin has no tokenizer yet: none written", file=sys.stderr)
    return generation


def make(arguments):
    """Entry point of `fixtures.py --shape`; reads `shape, out, config, layers, seed`."""
    out = arguments.out
    config = configuration(arguments)
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.safetensors")):
        sys.exit(f"{out} already holds weights: name another folder or empty it")
    generation = copy_tokenizer(out, config["vocab_size"])
    special = ("bos_token_id", "eos_token_id")
    config |= {key: generation[key] for key in special if key in generation}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation)

    tensors = parameter_shapes(out)
    groups = split(tensors)
    random = np.random.default_rng(arguments.seed)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        if len(groups) == 1:
            name = "model.safetensors"
        write_file(out / name, group, config["model_type"].startswith("gemma"), random)
        weight_map.update((tensor, name) for tensor, _ in group)
        print(f"{out / name}: {len(group)} tensors", flush=True)
    total = sum(math.prod(dims) for _, dims in tensors)
    if len(groups) > 1:
        index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    print(f"{arguments.shape}: {total / 1e6:.1f} million parameters, {2 * total / 1e9:.2f} GB")
