"""Hugging Face transformers as a peer: `generate` of a bf16 model on the CPU. See measure.py."""

import torch
import transformers
from measure import measure, options

options = options()
torch.set_num_threads(options.threads)
model = transformers.AutoModelForCausalLM.from_pretrained(
    options.model, dtype=getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[options.weights])
)
model.eval()


@torch.inference_mode()
def generate(prompts, count):
    ids = torch.tensor(prompts)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


measure(options, f"transformers {transformers.__version__}, torch {torch.__version__}", generate)
