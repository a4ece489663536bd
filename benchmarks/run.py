"""All benchmarks, or the named ones, and whether each number is what it should be.

python benchmarks/run.py [a c | all_pairs heads ...] [--models gemma-3-270m smollm2-135m-instruct] [--repeats 3]

Give the machine nothing else to do: ratios on a busy machine mean little.
"""

import all_pairs
import backpatch
import checks
import features
import fused
import generation
import growth
import heads
import jacobian
import layers
import long_prompts
import memory
import neurons
import overhead
import questions
import relation
from common import main

if __name__ == "__main__":
    parts = (all_pairs, layers, heads, neurons, long_prompts, fused, backpatch, generation, jacobian, overhead, growth, memory, relation)
    main({part.__name__: part.bench for part in (*parts, questions, features, checks)})
