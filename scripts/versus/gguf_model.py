"""Writes a checkpoint as a GGUF file: for speed, with the weights that everyone else has.

    python gguf_model.py CHECKPOINT_DIR OUT.gguf bf16|f16|q8_0|q4_0

Reads the safetensors of `random_checkpoint.py` (bf16; Llama and Qwen2 families). In a q4_0 file the embedding, which is
the head too where it is tied, is q8_0, as a head usually is. Rows of q and k are not permuted for Llama's rotary layout:
of random weights any order is as good.

Invariant: shapes are those of the configuration; the vocabulary is filled up to its size with unused tokens.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
NORMAL, CONTROL, UNUSED = 1, 3, 5


def tensors(folder):
    """Name and values in f32 of each tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        length = int(data[:8].view("<u8")[0])
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                sys.exit(f"{name} is {entry['dtype']}, not BF16")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            bits = data[begin:end].view("<u2").astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])


def name_of(name):
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    for theirs, ours in LAYER.items():
        if rest.startswith(theirs):
            return f"blk.{layer}.{ours}{rest[len(theirs):]}"
    sys.exit(f"{name} has no name in GGUF here")


def kind_of(name, values, kind):
    """How a tensor is stored."""
    kinds = gguf.GGMLQuantizationType
    if values.ndim == 1:
        return kinds.F32
    if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return kinds.Q8_0
    return kinds[kind.upper()]


def add_vocabulary(writer, folder, size):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    tokens = [f"<unused_{number}>" for number in range(size)]
    types = [UNUSED] * size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    # In the template of a chat nobody chats here, but some readers want one.
    writer.add_chat_template("{{ messages[0]['content'] }}")


def main(folder, out, kind):
    config = json.loads((folder / "config.json").read_text())
    family = {"qwen2": "qwen2", "llama": "llama", "mistral": "llama"}.get(config["model_type"])
    if family is None:
        sys.exit(f"{config['model_type']}: only Qwen2, Llama and Mistral shapes are written")
    writer = gguf.GGUFWriter(out, family)
    heads = config["num_attention_heads"]
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim", config["hidden_size"] // heads))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_bos_token_id(config["bos_token_id"])
    ends = config["eos_token_id"]
    writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    add_vocabulary(writer, folder, config["vocab_size"])
    for theirs, values in tensors(folder):
        name = name_of(theirs)
        stored = kind_of(name, values, kind)
        data = gguf.quants.quantize(values, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
