"""Run by vLLM's own Python (see test_vllm.py): asks a server through the openai client, plain and streaming.

Reads {"url": ..., "prompt": ..., "messages": [...], "tokens": n} from standard input, writes texts as JSON by kind.
"""

import json
import sys

from openai import OpenAI


def main() -> None:
    job = json.load(sys.stdin)
    client = OpenAI(base_url=job["url"], api_key="none", timeout=300)
    (model,) = client.models.list().data
    options = {"model": model.id, "max_tokens": job["tokens"], "temperature": 0, "extra_body": {"ignore_eos": True}}
    complete, chat = client.completions.create, client.chat.completions.create
    streamed = complete(prompt=job["prompt"], stream=True, **options)
    talked = chat(messages=job["messages"], stream=True, **options)
    found = {
        "completion": complete(prompt=job["prompt"], **options).choices[0].text,
        "completion, streaming": "".join(part.choices[0].text for part in streamed),
        "chat": chat(messages=job["messages"], **options).choices[0].message.content,
        "chat, streaming": "".join(part.choices[0].delta.content or "" for part in talked),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
