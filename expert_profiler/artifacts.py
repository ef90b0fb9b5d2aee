# SPDX-License-Identifier: Apache-2.0
"""The files of a profiled run, which lie in one folder."""

#: A name by what it holds, in the order of ``expert-profiler validate``'s options.
NAMES = {
    "routes": "moe_routes.jsonl",
    "outputs": "outputs.jsonl",
    "timing": "timing.json",
    "prompts": "prompts.txt",
    "hist": "expert_hist.png",
}
#: Between two prompts of prompts.txt.
PROMPT_SEPARATOR = "\n\n---\n\n"
