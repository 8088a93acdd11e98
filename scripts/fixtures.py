#!/usr/bin/env python3
"""Makes the tiny model fixtures with their reference outputs, and larger random models on demand.

    target/venv/bin/python scripts/fixtures.py                 all of shard/tests/fixtures/
    target/venv/bin/python scripts/fixtures.py --only qwen3    one of them
    target/venv/bin/python scripts/fixtures.py --check         recompute, compare, write nothing
    target/venv/bin/python scripts/fixtures.py --shape llama-3.2-1b --out DIR

The last form writes a random model of a published shape; `random_checkpoint.py` does that.
The environment comes from `scripts/python_env.sh`. The weights are random; nothing is downloaded.

A fixture is a folder in the published layout plus `reference.safetensors`: a 40-token prompt, the
logits at all of its positions and 24 greedy tokens, computed in f32 by `transformers` with eager
attention from the files as written, that is from the rounded weights.

Invariants, asserted before a folder is kept: `transformers` reads the folder without a missing or
an unexpected tensor; greedy choices are not ties (top-1 leads top-2 by `MARGIN` standard
deviations of the logits at every step); every feature the case is there for changes the logits.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from fixture_cases import CASES

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "shard" / "tests" / "fixtures"

PROMPT_TOKENS = 40
GREEDY_TOKENS = 24
# Ids below this are kept for special tokens: never in a prompt, never a greedy choice.
SPECIAL_IDS = 8
# Smallest lead of the greedy token over the next, in standard deviations of that step's logits.
MARGIN = 0.08
# A feature that is switched off must move some logit by this many standard deviations.
ABLATION = 0.2
# A fixture whose greedy text repeats one token would test little.
DISTINCT_TOKENS = 10
# Prompts are tried in batches of this size, at most so many.
BATCH = 512
BATCHES = 24
# The committed files stay small.
MAX_BYTES = 300_000

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def stored_dtype(config):
    return DTYPES[config.get("dtype") or config["torch_dtype"]]


def random_weight(name, shape, config, generator):
    """One tensor, scaled so that every layer contributes and attention is far from uniform.

    Published initialisers (0.02 everywhere) would leave a two-layer model that ignores its context:
    each product here keeps unit variance, queries and keys are a little larger.
    """
    noise = torch.randn(shape, generator=generator)
    # Gemma stores norm weights as their distance from 1, and multiplies embeddings by the root of the width.
    is_gemma = config.model_type.startswith("gemma")
    tied = config.tie_word_embeddings
    if is_gemma and name == "model.norm.weight":
        # Far from 1, as published: what is stored must not be rounded after the addition.
        return 6.0 + noise
    if name.endswith("norm.weight"):
        return 0.3 * noise + (0.0 if is_gemma else 1.0)
    if name.endswith(".bias"):
        return 0.5 * noise
    if name.endswith("embed_tokens.weight"):
        # A tied table is also the head: small, so that the residual does not echo the last token.
        return noise * ((0.15 if tied else 1.0) * (0.25 if is_gemma else 1.0))
    gain = 1.6 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    weight = noise * (gain / math.sqrt(shape[-1]))
    if name.endswith("lm_head.weight"):
        # Rows of unequal length spread the top of the distribution: fewer near ties.
        weight *= torch.exp(0.3 * torch.randn(shape[0], 1, generator=generator))
    return weight


def make_tensors(config_dir, seed):
    """Random tensors under the names that `transformers` gives the parameters, no tied head."""
    config = AutoConfig.from_pretrained(config_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_weight(name, tuple(parameter.shape), config, generator)
        for name, parameter in model.named_parameters()
    }


def write_weights(folder, tensors, files):
    """`model.safetensors`, or numbered files with an index, as the hub tools write them."""
    metadata = {"format": "pt"}
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        return
    # Alternate rather than cut in two, so that tensors of one layer lie in both files.
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::files]}
        save_file(part, folder / name, metadata=metadata)
        weight_map.update(dict.fromkeys(part, name))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def load_model(folder):
    """The folder as `transformers` reads it, in f32 with eager attention."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], f"{folder.name}: {kind} {report[kind]}"
    return model.eval()


def load_stored(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


@torch.no_grad()
def greedy(model, prompts):
    """Greedy continuation of each row and, step by step, its lead: both [rows, steps]."""
    tokens, leads = [], []
    cache, step = None, prompts
    for _ in range(GREEDY_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True)
        logits, cache = out.logits[:, -1], out.past_key_values
        best = logits.topk(2).values
        leads.append((best[:, 0] - best[:, 1]) / logits.std(dim=-1))
        step = logits.argmax(dim=-1, keepdim=True)
        tokens.append(step)
    return torch.cat(tokens, dim=1), torch.stack(leads, dim=1)


def find_prompt(model, seed, vocab):
    """The prompt with the clearest greedy choices in the first batch that holds a clear one."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(BATCHES):
        shape = (BATCH, PROMPT_TOKENS)
        prompts = torch.randint(SPECIAL_IDS, vocab, shape, generator=generator)
        tokens, leads = greedy(model, prompts)
        distinct = torch.tensor([row.unique().numel() for row in tokens])
        usable = (tokens >= SPECIAL_IDS).all(dim=1) & (distinct >= DISTINCT_TOKENS)
        margins = torch.where(usable, leads.min(dim=1).values, torch.tensor(-1.0))
        if margins.max() > 1.1 * MARGIN:
            return prompts[margins.argmax()]
    raise SystemExit(f"no prompt with a margin above {MARGIN}: take another seed")


@torch.no_grad()
def make_reference(model, prompt):
    """Reference tensors for one prompt, and the smallest greedy margin, found without a cache."""
    tokens, _ = greedy(model, prompt[None])
    tokens = tokens[0]
    # One pass over everything must choose the same tokens: cached and uncached agree.
    text = torch.cat([prompt, tokens])
    logits = model(text[None], use_cache=False).logits[0]
    steps = logits[PROMPT_TOKENS - 1 : -1]
    assert torch.equal(steps.argmax(dim=-1), tokens), "cached and whole passes disagree"
    best = steps.topk(2).values
    margin = ((best[:, 0] - best[:, 1]) / steps.std(dim=-1)).min().item()
    alone = model(prompt[None], use_cache=False).logits[0]
    reference = {"prompt_ids": prompt, "logits": alone, "greedy_ids": tokens}
    return {name: tensor.contiguous() for name, tensor in reference.items()}, margin


@torch.no_grad()
def check_ablation(folder, ablation, reference):
    """Switch one feature off; returns how far the logits move, in standard deviations."""
    config = json.loads((folder / "config.json").read_text()) | ablation.config
    with tempfile.TemporaryDirectory() as scratch:
        changed = Path(scratch)
        for path in folder.glob("model*"):
            shutil.copy(path, changed)
        write_json(changed / "config.json", config)
        model = load_model(changed)
    for name, parameter in model.named_parameters():
        for ending, value in ablation.tensors.items():
            if name.endswith(ending):
                parameter.fill_(value)
    logits = model(reference["prompt_ids"][None], use_cache=False).logits[0]
    moved = (logits - reference["logits"]).abs().amax(dim=-1) / reference["logits"].std()
    start = ablation.first_position
    # Positions the feature cannot reach stay put, or the ablation changed something else too.
    assert (moved[:start] < 1e-4).all(), f"{folder.name}: {ablation.label} moves early positions"
    assert moved[start:].max() > ABLATION, f"{folder.name}: {ablation.label} does not matter"
    return moved.max().item()


def make_case(case, folder):
    """Write one fixture into `folder`; returns the line that describes it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", case.config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "5.23.0"}
    write_json(folder / "generation_config.json", generation | case.generation)

    dtype = stored_dtype(case.config)
    tensors = {key: t.to(dtype).contiguous() for key, t in make_tensors(folder, case.seed).items()}
    write_weights(folder, tensors, case.files)

    model = load_model(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name].float()), f"{name} was not read as stored"
    prompt = find_prompt(model, case.seed, case.config["vocab_size"])
    reference, margin = make_reference(model, prompt)
    assert margin > MARGIN, f"{case.name}: margin {margin:.3f} without a cache"
    made = {"seed": case.seed, "margin": round(margin, 4), "transformers": "5.23.0"}
    # One entry, because several are written in an order that changes from run to run.
    metadata = {"made": json.dumps(made)}
    save_file(reference, folder / "reference.safetensors", metadata=metadata)
    return describe(case, folder, reference, margin)


def describe(case, folder, reference, margin):
    moved = [f"{a.label} {check_ablation(folder, a, reference):.2f}" for a in case.ablations]
    weights = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    assert weights < MAX_BYTES, f"{case.name}: {weights} bytes of weights"
    distinct = reference["greedy_ids"].unique().numel()
    return (
        f"{case.name:13} {weights // 1000:4} kB  margin {margin:.3f} std  "
        f"{distinct:2} distinct tokens  moves: {', '.join(moved)}"
    )


def check_case(case, folder):
    """Recompute the reference of a committed fixture; the prompt is taken from it."""
    committed = json.loads((folder / "config.json").read_text())
    assert committed == case.config, f"{case.name}: config.json is not the one in fixture_cases.py"
    stored = load_file(folder / "reference.safetensors")
    reference, margin = make_reference(load_model(folder), stored["prompt_ids"])
    # Processors differ in the last bits of a product; a different model differs in the first.
    torch.testing.assert_close(reference["logits"], stored["logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(reference["greedy_ids"], stored["greedy_ids"]), case.name
    for tensor in load_stored(folder).values():
        assert tensor.dtype == stored_dtype(case.config), f"{case.name}: stored as {tensor.dtype}"
    return describe(case, folder, stored, margin)


README = """\
# Model fixtures

Tiny random checkpoints in the published layout, one folder for each thing that a family of models
does differently, with the outputs that `transformers` computes from them. All weights are random
numbers made by `scripts/fixtures.py`; none come from a published model.

    scripts/python_env.sh                                      # once: target/venv
    target/venv/bin/python scripts/fixtures.py                 # make all of them again
    target/venv/bin/python scripts/fixtures.py --only qwen3    # one of them
    target/venv/bin/python scripts/fixtures.py --check         # compare, write nothing

Each folder holds `config.json`, `generation_config.json`, `model.safetensors` (or two files and
`model.safetensors.index.json`) and `reference.safetensors`:

| tensor | type and shape | what it is |
|---|---|---|
| `prompt_ids` | i64 `[40]` | the prompt, without special tokens |
| `logits` | f32 `[40, vocab_size]` | logits at every position of the prompt |
| `greedy_ids` | i64 `[24]` | greedy continuation of the prompt |

References are computed in f32 with eager attention from the files as stored, so f16 and bf16
weights enter already rounded; `made` in the metadata of the reference states the seed, the
smallest lead of a greedy token over the next one (in standard deviations of that step's logits;
at least {margin} everywhere) and the version of `transformers`. Every greedy token is {special}
or above, so no continuation meets an end token. The script refuses a fixture whose named feature
does not move the logits when it is switched off.

The prompt is the clearest of {batch} random ones, so another processor or release of torch may
choose another one when a fixture is made again; `--check` holds on any.

| folder | seed | splits over | what it covers |
|---|---|---|---|
{rows}
The tests assert logits within 1e-3 relative of the reference and identical greedy tokens.

`quantised/` holds checkpoints of the same kind in the published quantised layouts (GPTQ, AWQ, compressed-tensors, fp8), made by
`scripts/quantised_fixtures.py`; their references are computed from what the codes stand for.
"""


def readme():
    """The text of `shard/tests/fixtures/README.md`, its table made from the cases."""
    rows = "".join(
        f"| `{case.name}` | {case.seed} | {str(case.tensor_parallel)[1:-1]} | {case.covers} |\n"
        for case in CASES
    )
    return README.format(margin=MARGIN, special=SPECIAL_IDS, batch=BATCH, rows=rows)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="one fixture instead of all")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--shape", help="make a larger random model: a shape's name, or `custom`")
    parser.add_argument("--out", type=Path, help="folder for --shape")
    parser.add_argument("--config", type=Path, help="config.json for --shape custom")
    parser.add_argument("--layers", type=int, help="with --shape: another number of layers")
    parser.add_argument("--seed", type=int, default=0, help="with --shape: seed of the weights")
    arguments = parser.parse_args()
    if arguments.shape and not arguments.out:
        parser.error("--shape needs --out DIR")
    if (arguments.shape == "custom") != (arguments.config is not None):
        parser.error("--shape custom and --config FILE go together")
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.shape:
        import random_checkpoint

        random_checkpoint.make(arguments)
        return
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    cases = [case for case in CASES if arguments.only in (None, case.name)]
    if not cases:
        sys.exit(f"no fixture {arguments.only!r}: there are {', '.join(c.name for c in CASES)}")
    if arguments.check:
        assert (FIXTURES / "README.md").read_text() == readme(), "README.md is out of date"
    for case in cases:
        work = check_case if arguments.check else make_case
        print(work(case, FIXTURES / case.name), flush=True)
    if not arguments.check:
        (FIXTURES / "README.md").write_text(readme())


if __name__ == "__main__":
    main()
