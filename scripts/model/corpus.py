"""Builds the training corpus, the tokenizer and the held-out questions, all from one seed.

    corpus.py --out target/model [--tokens 12500000] [--seed 1]

Writes `early_tokens.bin` (u16) and `early_weights.bin` (u8, 1 where a token counts for the loss), the
same for the phases `late` (more questions) and `long` (conversations as long as the context), and
the tokenizer's files and the held-out questions beside them. Downloads nothing.
Does not train. Invariant: the same arguments give the same bytes.
"""

import argparse
import json
import pathlib
import random

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import chat
import scenes
import stories

VOCAB = 4096
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END = SPECIAL = [
    "<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
MAX_POSITIONS = 1024

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def system_turn(rng):
    """A system message for a quarter of the conversations; the answers do not depend on it."""
    return SYSTEM + rng.choice(chat.SYSTEM) + END if rng.random() < 0.25 else ""


def exchanges(rng, units, late=False):
    """`units` exchanges as (text, counts for the loss) pieces; each answer counts, no question does."""
    pieces = []
    for _ in range(units):
        pick = rng.random()
        if pick < 0.72:
            turns = [chat.single(rng, late=late)]
        elif pick < 0.94:
            turns = chat.dialogue(rng)
        else:
            turns = [chat.small_talk(rng)]
        for question, answer in turns:
            pieces += [(USER + question + END + ASSISTANT, False), (answer + END, True)]
    return pieces


def document(rng, late=False):
    """One document: a story, a scene, a story told on request, or a conversation of a few exchanges.

    Late in the training fewer stories, for sentences are learnt before sorting is.
    """
    pick = rng.random() * (2.6 if late else 1.0)
    if pick < 0.13:
        return [(BOS, False), (stories.story(rng)[1] + EOS, True)]
    if pick < 0.18:
        return [(BOS, False), (scenes.scene(rng) + EOS, True)]
    if pick < 0.26:
        question, text = chat.story_request(rng)
        return [(BOS + system_turn(rng) + USER + question + END + ASSISTANT, False), (text + END, True)]
    return [(BOS + system_turn(rng), False)] + exchanges(rng, rng.choice([1, 1, 1, 1, 1, 2, 2, 3, 4]), late)


def late_document(rng):
    """A document for the second part of the training."""
    return document(rng, late=True)


def long_document(rng):
    """A conversation that fills most of the context, with a story here and there."""
    pieces = [(BOS + system_turn(rng), False)] + exchanges(rng, rng.randint(8, 20))
    for _ in range(rng.choice([0, 1, 2])):
        question, text = chat.story_request(rng)
        pieces += [(USER + question + END + ASSISTANT, False), (text + END, True)]
        pieces += exchanges(rng, rng.randint(1, 4))
    return pieces


def train_tokenizer(seed):
    """Byte-level BPE over 40,000 documents; digits stand alone; BOS is added to plain text."""
    rng = random.Random(seed)
    texts = (text for _ in range(40_000) for text, _ in document(rng))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)

    def plain():
        for text in texts:
            for token in SPECIAL:
                text = text.replace(token, "\n")
            yield from text.split("\n")
    tokenizer.train_from_iterator(plain(), trainer)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL.index(BOS))])])
    return tokenizer


def save_tokenizer(tokenizer, out):
    """The two published files: the tokenizer and its configuration with the chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    added = {str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
             for i, t in enumerate(SPECIAL)}
    config = {"added_tokens_decoder": added, "bos_token": BOS, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
              "eos_token": END, "model_max_length": MAX_POSITIONS, "pad_token": PAD, "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def encode(tokenizer, documents, limit):
    """Token ids and loss flags of documents until `limit` tokens."""
    ids, flags, batch = [], [], []
    total = 0
    while total < limit:
        batch = [piece for _ in range(2000) for piece in next(documents)]
        encoded = tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for (_, counts), one in zip(batch, encoded):
            ids.append(np.array(one.ids, dtype=np.uint16))
            flags.append(np.full(len(one.ids), counts, dtype=np.uint8))
            total += len(one.ids)
    return np.concatenate(ids)[:limit], np.concatenate(flags)[:limit]


def held_out_questions(seed, per_task=40):
    """Questions of the held-out tenth, none twice, the README's own first."""
    rng, rows, seen = random.Random(seed), [], set()

    def add(task, turns):
        key = "\n".join(question for question, _ in turns)
        if key in seen:
            return False
        seen.add(key)
        messages = []
        for question, answer in turns[:-1]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": turns[-1][0]})
        rows.append({"task": task, "messages": messages, "answer": turns[-1][1]})
        return True

    add("sums", [("What is 7 plus 5?", "7 plus 5 is 12.")])
    for task in chat.TASKS:
        wanted, tries = per_task - (task == "sums"), 0
        while wanted and tries < 4000:
            wanted -= add(task, [chat.single(rng, task, want_held_out=True)])
            tries += 1
    wanted = per_task
    while wanted:
        wanted -= add("dialogue", chat.dialogue(rng, want_held_out=True))
    return rows


def held_out_stories(seed, count=100):
    """Stories by a seed of their own, none twice. Plots and words are those of the training; the texts are not."""
    rng, texts = random.Random(seed), {}
    while len(texts) < count:
        texts[stories.story(rng)[1]] = None
    return [{"text": text} for text in texts]


def forever(make, rng):
    while True:
        yield make(rng)


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path("target/model"))
    args.add_argument("--tokens", type=int, default=12_500_000)
    args.add_argument("--late-tokens", type=int, default=6_000_000)
    args.add_argument("--long-tokens", type=int, default=1_200_000)
    args.add_argument("--seed", type=int, default=1)
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed)
    save_tokenizer(tokenizer, args.out)
    print("vocabulary", tokenizer.get_vocab_size(), flush=True)
    rows = held_out_questions(args.seed + 1)
    (args.out / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = held_out_stories(args.seed + 96)
    (args.out / "heldout_stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    phases = [("early", document, args.tokens), ("long", long_document, args.long_tokens), ("late", late_document, args.late_tokens)]
    for number, (phase, make, limit) in enumerate(phases):
        ids, flags = encode(tokenizer, forever(make, random.Random(args.seed + 2 + number)), limit)
        ids.tofile(args.out / f"{phase}_tokens.bin")
        flags.tofile(args.out / f"{phase}_weights.bin")
        print(f"{phase}: {len(ids)} tokens, {flags.mean():.2f} of them count", flush=True)


if __name__ == "__main__":
    main()
