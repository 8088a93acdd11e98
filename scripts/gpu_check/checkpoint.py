"""Writes a random bf16 checkpoint of Llama-3.1-8B's shape, for speed: its weights are noise.

    python3 -m gpu_check.checkpoint DIR [--layers 32]

Made on the GPU, tensor by tensor, in files of about 2 GB. There is no tokenizer of its own: `cluster up` needs
one, so a byte-level one with the ids of that vocabulary is written. Not for correctness; the fixtures are.

Invariant: a folder that has `config.json` is complete, because that is written last.
"""

import argparse
import json
import math
from pathlib import Path

HIDDEN, WIDE, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 128256
FILE_BYTES = 2 << 30


def config(layers):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


def shapes(layers):
    """Names and shapes of all tensors, in the order in which they are stored."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        head = HIDDEN // HEADS
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (KV_HEADS * head, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (KV_HEADS * head, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
        yield prefix + "mlp.gate_proj.weight", (WIDE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (WIDE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, WIDE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def files(layers):
    """The tensors, cut into files."""
    file, size = [], 0
    for name, shape in shapes(layers):
        size_of = 2 * math.prod(shape)
        if file and size + size_of > FILE_BYTES:
            yield file
            file, size = [], 0
        file.append((name, shape))
        size += size_of
    yield file


def write(folder, layers, device):
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device=device).manual_seed(20)
    cut = list(files(layers))
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, names in enumerate(cut, start=1):
        tensors = {}
        for name, shape in names:
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
                tensors[name] = (noise * 0.02).to(torch.bfloat16).cpu()
            index["metadata"]["total_size"] += 2 * math.prod(shape)
        file = f"model-{number:05}-of-{len(cut):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index["weight_map"].update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config(layers), indent=1))


def write_tokenizer(folder):
    """Bytes as tokens; ids above them are words that no text contains."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: at for at, letter in enumerate(alphabet)}
    vocab.update({f"<{at}>": at for at in range(len(alphabet), VOCAB)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<128001>"}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        write(args.folder, args.layers, args.device)


if __name__ == "__main__":
    main()
