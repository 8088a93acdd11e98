"""OpenVINO GenAI as a peer: its pipeline over a GGUF file, computing in what --weights says where the processor
has instructions for it. See measure.py.
"""

import numpy as np
import openvino
import openvino_genai
from measure import measure, options

options = options()
# Where weights are stored as f16 or in blocks, bf16 is what it computes in on processors that have it.
pipeline = openvino_genai.LLMPipeline(
    options.model,
    "CPU",
    INFERENCE_NUM_THREADS=options.threads,
    INFERENCE_PRECISION_HINT="bf16",
)


def generate(prompts, count):
    ids = np.array(prompts, dtype=np.int64)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = count
    config.ignore_eos = True
    config.do_sample = False
    inputs = openvino_genai.TokenizedInputs(
        openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
    )
    pipeline.generate(inputs, config)


measure(options, f"openvino-genai {openvino_genai.__version__}", generate)
