"""Held-out answer accuracy of a published model directory, through `transformers`, greedy decoding.

    evaluate.py [--dir coordinator/builtin] [--stories 0] [--draw SEED]

Reads the directory alone: configuration, tokenizer, chat template, weights and `heldout.jsonl`
(or, with `--draw`, asks up to 100 other held-out questions per task, drawn by that seed).
An answer is right when the whole generated text equals the expected one. Trains nothing.
"""

import argparse
import collections
import json
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus

LONGEST_ANSWER = 48


def answers(model, tokenizer, conversations, batch=32):
    """Greedy answers to conversations (lists of messages), in batches padded on the left."""
    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in conversations]
    found = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                                 temperature=None, top_p=None, max_new_tokens=LONGEST_ANSWER)
        found += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def accuracy(directory, show_wrong=0, rows=None):
    """Returns (right, asked) per task, the model and the tokenizer; prints some wrong answers."""
    directory = pathlib.Path(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # bf16 weights, f32 arithmetic: what the CPU server computes.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rows = rows or [json.loads(line) for line in (directory / "heldout.jsonl").read_text().splitlines()]
    table = collections.defaultdict(lambda: [0, 0])
    for row, got in zip(rows, answers(model, tokenizer, [row["messages"] for row in rows])):
        right = got == row["answer"]
        table[row["task"]][0] += right
        table[row["task"]][1] += 1
        if not right and show_wrong > 0:
            show_wrong -= 1
            print(f"  wrong: {row['messages'][-1]['content']!r} -> {got!r}, expected {row['answer']!r}")
    return table, model, tokenizer


def print_table(table):
    """One line per task and the total; returns the total accuracy in percent."""
    for task, (right, asked) in table.items():
        print(f"{task:14} {right:4} / {asked:<4} {100 * right / asked:5.1f} %")
    right, asked = (sum(column) for column in zip(*table.values()))
    print(f"{'total':14} {right:4} / {asked:<4} {100 * right / asked:5.1f} %", flush=True)
    return 100 * right / asked


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("coordinator/builtin"))
    args.add_argument("--stories", type=int, default=0, help="also print this many sampled stories")
    args.add_argument("--draw", type=int, metavar="SEED", help="ask held-out questions drawn by this seed, not the committed ones")
    args = args.parse_args()
    rows = corpus.held_out_questions(args.draw, per_task=100) if args.draw is not None else None
    table, model, tokenizer = accuracy(args.dir, show_wrong=20, rows=rows)
    print_table(table)
    torch.manual_seed(0)
    for number in range(args.stories):
        # Plain text and a request in turns: the two ways in which stories are asked for.
        prompt, plain = ("Once upon a time", True) if number % 2 == 0 else ("Tell me a story about a fox.", False)
        if not plain:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=plain)["input_ids"]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=400)
        print("---", tokenizer.decode(out[0], skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    main()
