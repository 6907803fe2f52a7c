"""Run by vLLM's own Python, not by ours (see test_vllm.py): what checkpoints answer, a line of JSON for each.

Reads {"folders": [...], "prompts": [[id, ...], ...], "tokens": n, "options": {...}, "scores": false} from standard
input. Greedy tokens (prompts, n); with "scores" the log-probabilities (prompts, T - 1, vocabulary) of the tokens that
follow each of a prompt's T tokens but the last.
"""

import gc
import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    wanted = {"prompt_logprobs": -1} if job.get("scores") else {}
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, **wanted)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    for folder in job["folders"]:
        try:
            llm = LLM(
                folder, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.05,
                kv_cache_memory_bytes=1 << 26, **({"max_logprobs": -1} if wanted else {}), **job["options"],
            )  # fmt: skip
            answers = llm.generate(prompts, greedy, use_tqdm=False)
            if wanted:
                found = [[_scores(place) for place in answer.prompt_logprobs[1:]] for answer in answers]
            else:
                found = [list(answer.outputs[0].token_ids) for answer in answers]
        except Exception as error:  # noqa: BLE001  (whatever it is, the test reads it)
            found = f"{type(error).__name__}: {error}"
        llm = None
        gc.collect()
        cleanup_dist_env_and_memory()
        print("RESULT", json.dumps(found), flush=True)


def _scores(place):
    """Log-probabilities of every token, in order."""
    return [place[token].logprob for token in sorted(place)]


if __name__ == "__main__":
    main()
