"""What the card can do, and what `transformers` makes of it: prints one JSON object.

    python3 -m gpu_check.ceilings [--model DIR --batches 1,8,64 --context 512 --new 32 --prompt 2048]

The copy bandwidth counts bytes read and written of a large device-to-device copy; the product is 8192^3 in bf16
on random data. With --model the same shapes as `engine_speed`'s go through `generate` with random tokens.

Invariant: everything is timed by device events after warming up, and the median counts.
"""

import argparse
import json
import statistics

import torch


def median_ms(work, repeats=20, warm_up=5):
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def card():
    source = torch.randn(1 << 30, device="cuda", dtype=torch.float32)  # 4 GiB
    target = torch.empty_like(source)
    bytes_moved = 2 * source.numel() * source.element_size()
    bandwidth = bytes_moved / median_ms(lambda: target.copy_(source)) * 1e3
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3
    del a, b
    torch.cuda.empty_cache()
    return {
        "name": torch.cuda.get_device_name(),
        "bytes_per_s": bandwidth,
        "flops_per_s": flops,
    }


def peer(args):
    import transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to("cuda").eval()
    vocab = model.config.vocab_size
    generator = torch.Generator(device="cuda").manual_seed(1)

    def tokens(batch, length):
        return torch.randint(256, vocab, (batch, length), generator=generator, device="cuda")

    found = {"version": transformers.__version__, "decode_us": {}}
    with torch.inference_mode():
        for batch in args.batches:
            prompt = tokens(batch, args.context)

            def generate(new):
                fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
                mask = torch.ones_like(prompt)
                model.generate(prompt, attention_mask=mask, pad_token_id=0, **fixed)

            # The prompt's share is in both and falls out of the difference.
            short = median_ms(lambda: generate(1), repeats=2, warm_up=1)
            long = median_ms(lambda: generate(1 + args.new), repeats=2, warm_up=0)
            found["decode_us"][batch] = (long - short) / args.new * 1e3
        prompt = tokens(1, args.prompt)
        prefill = median_ms(lambda: model(prompt, logits_to_keep=1), repeats=5, warm_up=2)
        found["prefill_us"] = {args.prompt: prefill * 1e3}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(item) for item in text.split(",")]
    parser.add_argument("--model")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=2048)
    args = parser.parse_args()
    print(json.dumps(peer(args) if args.model else card()))


if __name__ == "__main__":
    main()
