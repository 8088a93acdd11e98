"""llama.cpp as a peer: its library through llama-cpp-python's bindings, a sequence for each prompt. See measure.py."""

import llama_cpp
from measure import measure, options

CHUNK = 2048

options = options()
most = max(options.decode, default=1)
longest = max(max(options.prefill, default=1), options.context) + options.steps + 1

model_params = llama_cpp.llama_model_default_params()
model_params.n_gpu_layers = 0
model = llama_cpp.llama_model_load_from_file(options.model.encode(), model_params)
params = llama_cpp.llama_context_default_params()
params.n_ctx = most * -(-longest // 256) * 256
params.n_batch, params.n_ubatch, params.n_seq_max = CHUNK, 512, most
params.n_threads = params.n_threads_batch = options.threads
context = llama_cpp.llama_init_from_model(model, params)
if not model or not context:
    raise SystemExit(f"llama.cpp does not take {options.model}")
greedy = llama_cpp.llama_sampler_init_greedy()
batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)


def decode(rows):
    """Computes rows of (token, position, sequence, whether its logits are needed)."""
    for index, (token, position, sequence, logits) in enumerate(rows):
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = logits
    batch.n_tokens = len(rows)
    if llama_cpp.llama_decode(context, batch):
        raise SystemExit("llama_decode failed")
    chosen = {}
    for index, (_, _, sequence, logits) in enumerate(rows):
        if logits:
            chosen[sequence] = llama_cpp.llama_sampler_sample(greedy, context, index)
    return chosen


def generate(prompts, count):
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    rows = [
        (token, position, sequence, position + 1 == len(prompt))
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    tokens = {}
    for first in range(0, len(rows), CHUNK):
        tokens |= decode(rows[first : first + CHUNK])
    for step in range(count - 1):
        tokens = decode(
            [
                (token, len(prompts[sequence]) + step, sequence, True)
                for sequence, token in sorted(tokens.items())
            ]
        )


measure(options, f"llama-cpp-python {llama_cpp.__version__}", generate)
