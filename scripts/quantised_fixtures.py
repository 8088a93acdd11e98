"""Makes the quantised model fixtures of `shard/tests/fixtures/quantised/`: tiny checkpoints in each published layout.

    target/venv/bin/python scripts/quantised_fixtures.py [--only NAME]

Packs random weights with numpy, from the published descriptions of the formats and independent of the Rust readers; writes
what `transformers` computes in f32 from the weights that the codes stand for as the reference. `--verify` compares
with what the packages of the formats' authors make of the same files, where they are installed beside torch
(`compressed-tensors`, but for act-order, which it does not decompress; `packing_utils.py` of `autoawq` by `--awq-utils
FILE`).

Invariant: a layout's reference is computed from integers and scales before they are packed, never from the packed words.
"""

import argparse
import importlib.util
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fixture_cases import llama, qwen2, qwen3
from fixtures import FIXTURES, find_prompt, load_model, make_reference, make_tensors, write_json

FOLDER = FIXTURES / "quantised"
GROUP = 32
BLOCK = [32, 32]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(fields, bits, axis, order=None):
    """Unsigned fields of `bits` bits, 32 / bits of them along `axis` to a word of 32, the first lowest."""
    fields = np.moveaxis(fields.astype(np.uint64), axis, -1)
    per_word = 32 // bits
    fields = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, -fields.shape[-1] % per_word)])
    fields = fields.reshape(*fields.shape[:-1], -1, per_word)
    if order:
        fields = fields[..., order]
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    words = (fields << shifts).sum(axis=-1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def stored(scale, dtype):
    """A scale as it is after storing."""
    return torch.from_numpy(scale).to(dtype).contiguous()


def whole_numbers(weight, group_of, bits, symmetric, dtype):
    """Codes [out, in], scales and zeros [out, groups] of a matrix whose inputs have groups; and what they stand for."""
    groups, most = group_of.max() + 1, 2**bits - 1
    low = np.stack([weight[:, group_of == g].min(axis=1) for g in range(groups)], axis=1)
    high = np.stack([weight[:, group_of == g].max(axis=1) for g in range(groups)], axis=1)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        scale = np.maximum(-low, high) * 2 / most
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / most
        zero = np.clip(np.round(-low / scale), 0, most)
    scales = stored(scale.astype(np.float32), dtype)
    scale = scales.float().numpy()
    codes = np.clip(np.round(weight / scale[:, group_of]) + zero[:, group_of], 0, most)
    meant = (codes - zero[:, group_of]) * scale[:, group_of]
    return codes, scales, zero, meant.astype(np.float32)


def in_order(inputs, group):
    return np.arange(inputs) // (group or inputs)


def gptq(weight, rng, bits, group, symmetric, act_order, version):
    inputs = weight.shape[1]
    group_of = in_order(inputs, group)
    if act_order:
        group_of = group_of[rng.permutation(inputs)]
    codes, scales, zero, meant = whole_numbers(weight, group_of, bits, symmetric, torch.float16)
    zeros = pack(zero.T, bits, 1)
    if version == 1:
        ones = np.int32(sum(1 << shift for shift in range(0, 32, bits)))
        zeros = torch.from_numpy(zeros.numpy() - ones)
    tensors = {
        "qweight": pack(codes.T, bits, 0),
        "qzeros": zeros,
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return tensors, meant


def awq(weight, rng):
    group_of = in_order(weight.shape[1], GROUP)
    codes, scales, zero, meant = whole_numbers(weight, group_of, 4, False, torch.float16)
    tensors = {
        "qweight": pack(codes.T, 4, 1, AWQ_ORDER),
        "qzeros": pack(zero.T, 4, 1, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }
    return tensors, meant


def packed(weight, rng, bits, group, symmetric=True, act_order=False):
    outputs, inputs = weight.shape
    group_of = in_order(inputs, group)
    if act_order:
        group_of = group_of[rng.permutation(inputs)]
    codes, scales, zero, meant = whole_numbers(weight, group_of, bits, symmetric, torch.bfloat16)
    tensors = {
        "weight_packed": pack(codes, bits, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(zero, bits, 0)
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return tensors, meant


def int8(weight, rng):
    scale = stored(np.abs(weight).max(axis=1, keepdims=True) / 127.5, torch.bfloat16)
    codes = np.clip(np.round(weight / scale.float().numpy()), -128, 127)
    tensors = {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": scale}
    return tensors, (codes * scale.float().numpy()).astype(np.float32)


def fp8(weight, rng, spread, name="weight_scale", dtype=torch.float32, static=False):
    """8-bit floats. `spread` says what shares a scale: `tensor`, `channel`, or a block's sizes."""
    most = torch.finfo(torch.float8_e4m3fn).max
    size = np.abs(weight)
    if spread == "tensor":
        scale = stored(np.array(size.max() / most, dtype=np.float32), dtype)
        each = scale.float().numpy()
    elif spread == "channel":
        scale = stored(size.max(axis=1, keepdims=True) / most, dtype)
        each = scale.float().numpy()
    else:
        rows, cols = spread
        padded = np.pad(size, [(0, -size.shape[0] % rows), (0, -size.shape[1] % cols)])
        blocks = padded.reshape(padded.shape[0] // rows, rows, -1, cols).max(axis=(1, 3))
        scale = stored(blocks / most, dtype)
        each = np.kron(scale.float().numpy(), np.ones((rows, cols), dtype=np.float32))
        each = each[: size.shape[0], : size.shape[1]]
    codes = torch.from_numpy(weight / each).clamp(-most, most).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, name: scale}
    if static:
        tensors["input_scale"] = torch.tensor(0.05)
    return tensors, (codes.float().numpy() * each).astype(np.float32)


def group_of_modules(format_, targets, weights, activations=None):
    weights = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None,
               "observer": "minmax", "symmetric": True} | weights
    return {"format": format_, "input_activations": activations, "output_activations": None,
            "targets": targets, "weights": weights}


def compressed(format_, groups, **more):
    return {"config_groups": {f"group_{n}": group for n, group in enumerate(groups)}, "format": format_,
            "ignore": ["lm_head"], "kv_cache_scheme": None, "quant_method": "compressed-tensors",
            "quantization_status": "compressed"} | more


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
MLP, ATTENTION = "re:.*mlp\\..*_proj$", "re:.*self_attn\\..*"
SIZES = (64, 96, 8, 4, 128)


def cases():
    """Name: the model's configuration, the quantisation's, and how a module's weight is packed (None: it is not)."""
    bf16, f16 = {"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}
    yield ("ct-int8", llama(*SIZES, **bf16),
           compressed("int-quantized", [group_of_modules(
               "int-quantized", ["Linear"], {"num_bits": 8, "type": "int", "strategy": "channel"}, PER_TOKEN)]),
           lambda name, w, rng: int8(w, rng))
    # Two groups of modules with bits of their own, one layer's down projection left alone.
    yield ("ct-packed", qwen2(*SIZES, **bf16),
           compressed("pack-quantized", [
               group_of_modules("pack-quantized", [MLP], INT4 | {"symmetric": False}),
               group_of_modules("pack-quantized", [ATTENTION],
                                {"num_bits": 8, "type": "int", "strategy": "channel"})],
               ignore=["lm_head", "re:.*layers\\.1\\.mlp\\.down"]),
           lambda name, w, rng: None if "1.mlp.down" in name else packed(w, rng, 4, GROUP, False)
           if "mlp" in name else packed(w, rng, 8, None))
    # Act-order, and a head that is quantised too, over a vocabulary that no number of ranks divides.
    yield ("ct-actorder", llama(64, 96, 8, 4, 131, **bf16),
           compressed("pack-quantized", [group_of_modules("pack-quantized", ["Linear"], INT4 | {"actorder": "group"})],
                      ignore=[]),
           lambda name, w, rng: packed(w, rng, 4, GROUP, True, True))
    yield ("ct-fp8", qwen3(*SIZES, head_dim=8, **bf16),
           compressed("float-quantized", [
               group_of_modules("float-quantized", [ATTENTION], {"num_bits": 8, "type": "float", "strategy": "channel"},
                                PER_TOKEN | {"type": "float"}),
               group_of_modules("float-quantized", ["Linear"], {"num_bits": 8, "type": "float", "strategy": "block",
                                                                "block_structure": BLOCK})]),
           lambda name, w, rng: fp8(w, rng, "channel" if "attn" in name else BLOCK, dtype=torch.bfloat16))
    gptq_config = {"bits": 4, "group_size": GROUP, "sym": False, "desc_act": True, "damp_percent": 0.01,
                   "quant_method": "gptq", "checkpoint_format": "gptq"}
    yield ("gptq-actorder", llama(*SIZES, **f16), gptq_config,
           lambda name, w, rng: gptq(w, rng, 4, GROUP, False, True, 1))
    yield ("gptq-v2", qwen2(*SIZES, **f16),
           gptq_config | {"group_size": -1, "desc_act": False, "checkpoint_format": "gptq_v2"},
           lambda name, w, rng: gptq(w, rng, 4, None, False, False, 2))
    yield ("gptq-8bit", llama(*SIZES, **f16), gptq_config | {"bits": 8, "sym": True, "desc_act": False},
           lambda name, w, rng: gptq(w, rng, 8, GROUP, True, False, 1))
    yield ("awq", qwen2(*SIZES, **f16),
           {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True,
            "modules_to_not_convert": ["layers.0.self_attn"]},
           lambda name, w, rng: None if "layers.0.self_attn" in name else awq(w, rng))
    yield ("fp8-tensor", llama(*SIZES, **bf16), {"quant_method": "fp8", "activation_scheme": "static"},
           lambda name, w, rng: fp8(w, rng, "tensor", static=True))
    # 80 is no multiple of a block, nor is a rank's part of it.
    yield ("fp8-block", qwen3(64, 80, 8, 4, 128, head_dim=8, **bf16),
           {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": BLOCK,
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]},
           lambda name, w, rng: None if "1.mlp.gate" in name or "1.mlp.up" in name
           else fp8(w, rng, BLOCK, "weight_scale_inv"))


def is_linear(name):
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def make(name, config, quantization, packer, seed):
    """Writes one fixture; returns the weights that it stands for."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = getattr(torch, config["torch_dtype"])
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch)
        write_json(dense / "config.json", config)
        written, meant = {}, {}
        for key, weight in make_tensors(dense, seed).items():
            head_is_quantised = quantization.get("ignore") == []
            made = None
            if is_linear(key) and (key != "lm_head.weight" or head_is_quantised):
                made = packer(key, weight.numpy().astype(np.float32), rng)
            if made is None:
                weight = weight.to(dtype).contiguous()
                written[key], meant[key] = weight, weight.float()
                continue
            tensors, values = made
            module = key.removesuffix(".weight")
            written.update({f"{module}.{part}": tensor.contiguous() for part, tensor in tensors.items()})
            meant[key] = torch.from_numpy(values)
        save_file(meant, dense / "model.safetensors", metadata={"format": "pt"})
        model = load_model(dense)
        prompt = find_prompt(model, seed, config["vocab_size"])
        reference, margin = make_reference(model, prompt)
    write_json(folder / "config.json", config | {"quantization_config": quantization})
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(reference, folder / "reference.safetensors", metadata={"made": json.dumps({"seed": seed})})
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name:14} {size // 1000:4} kB  margin {margin:.3f} std", flush=True)
    return meant


def verify_compressed(name, meant):
    """What compressed-tensors decompresses from the fixture is what the reference was computed from."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    tensors = load_file(FOLDER / name / "model.safetensors")
    for key, value in meant.items():
        part = key.removesuffix("weight")
        if part + "weight_scale" not in tensors:
            continue
        groups = config["config_groups"].values()
        group = next(group for group in groups for target in group["targets"]
                     if target == "Linear" or re.match(target.removeprefix("re:"), part[:-1]))
        own = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        if "weight_g_idx" in own:
            print(f"{name}: compressed-tensors decompresses no act-order: not compared")
            return
        reader = BaseCompressor.get_value_from_registry(group["format"])
        found = reader.decompress(own, QuantizationScheme.model_validate(group))["weight"]
        torch.testing.assert_close(found.float(), value, rtol=1e-2, atol=1e-4, msg=lambda m: f"{key}: {m}")
    print(f"{name}: compressed-tensors reads it alike")


def verify_awq(utils, meant):
    spec = importlib.util.spec_from_file_location("packing_utils", utils)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors = load_file(FOLDER / "awq" / "model.safetensors")
    for key, value in meant.items():
        part = key.removesuffix("weight")
        if part + "qweight" in tensors:
            found = module.dequantize_gemm(*(tensors[part + kind] for kind in ("qweight", "qzeros", "scales")), 4, GROUP)
            torch.testing.assert_close(found.T.float(), value, rtol=2e-3, atol=1e-4)
    print("awq: autoawq reads it alike")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="one fixture instead of all")
    parser.add_argument("--verify", action="store_true", help="compare with other packages' readers")
    parser.add_argument("--awq-utils", type=Path, help="with --verify: autoawq's packing_utils.py")
    arguments = parser.parse_args()
    for seed, (name, config, quantization, packer) in enumerate(cases(), start=100):
        if arguments.only not in (None, name):
            continue
        meant = make(name, config, quantization, packer, seed)
        if arguments.verify and name.startswith("ct-"):
            verify_compressed(name, meant)
        if arguments.verify and name == "awq" and arguments.awq_utils:
            verify_awq(arguments.awq_utils, meant)


if __name__ == "__main__":
    main()
