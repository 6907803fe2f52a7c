"""Run by vLLM's own Python, not by ours (see test_vllm.py): greedy tokens of checkpoints, a line of JSON for each.

Reads {"folders": [...], "prompts": [[id, ...], ...], "tokens": n, "options": {...}} from standard input.
"""

import gc
import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    for folder in job["folders"]:
        try:
            llm = LLM(
                folder, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.05,
                kv_cache_memory_bytes=1 << 26, **job["options"],
            )  # fmt: skip
            found = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, greedy, use_tqdm=False)]
        except Exception as error:  # noqa: BLE001  (whatever it is, the test reads it)
            found = f"{type(error).__name__}: {error}"
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
