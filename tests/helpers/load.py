"""Clients that ask a server again and again, in a process of their own.        python load.py URL CLIENTS SECONDS < prompts.json

Prints a JSON list, for each client: [seconds to the first token, number of the prompt, text] of each answer, how often it was
refused, and what else went wrong.
"""

import asyncio
import json
import sys
import time
from typing import Any


async def client(host: str, port: int, number: int, prompts: list[str], end: float) -> dict[str, Any]:
    """Streams one answer after another until `end`; after a 429 it waits as long as it was told, at most 2 s."""
    answers, refused, wrong, turn = [], 0, [], number
    while time.monotonic() < end:
        turn += 1
        which = turn % len(prompts)
        begin = time.monotonic()
        try:
            status, headers, first, text = await asyncio.wait_for(ask(host, port, prompts[which]), 60)
        except (TimeoutError, OSError, asyncio.IncompleteReadError, ValueError) as error:
            wrong.append(repr(error))
            continue
        if status == 429:
            refused += 1
            if not 1 <= int(headers.get("retry-after", "0")) <= 60 or json.loads(text)["error"]["code"] != "queue_full":
                wrong.append(text)
            await asyncio.sleep(min(2, int(headers.get("retry-after", "1"))))
        elif status == 200:
            answers.append((first - begin, which, text))
        else:
            wrong.append(f"{status}: {text}")
    return {"answers": answers, "refused": refused, "wrong": wrong}


async def ask(host: str, port: int, prompt: str) -> tuple[int, dict[str, str], float, str]:
    """(status, headers, time of the first token, text) of one streamed completion."""
    body = json.dumps({"prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).decode().strip():
            key, _, value = line.partition(":")
            headers[key.lower()] = value.strip()
        if status != 200:
            return status, headers, 0.0, (await reader.read()).decode()
        first, text, done = 0.0, "", False
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                text += "".join(choice["text"] for choice in choices)
                first = first or (time.monotonic() if text else 0.0)
            done |= line.startswith(b"data: [DONE]")
        if not done:
            raise ValueError("a stream without an end")
        return status, headers, first or time.monotonic(), text
    finally:
        writer.close()


async def main(url: str, clients: int, seconds: float) -> None:
    """All clients at once."""
    host, port = url.removeprefix("http://").split(":")
    prompts, end = json.load(sys.stdin), time.monotonic() + seconds
    found = await asyncio.gather(*(client(host, int(port), i, prompts, end) for i in range(clients)))
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
