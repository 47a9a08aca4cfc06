"""48 questions about six modules of Python's standard library, eight at a time, as any client would ask them."""

import importlib
import inspect
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:30000/v1", api_key="none")


def ask(module, function):
    system = "You explain Python code.\n" + inspect.getsource(module)[:3000]
    question = f"What does this do?\n{inspect.getsource(function)[:400]}"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    answer = client.chat.completions.create(model="default", messages=messages, max_tokens=32, temperature=0)
    return answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens


jobs = []
for i in range(8):
    for name in ("textwrap", "inspect", "shutil", "tokenize", "tarfile", "doctest"):
        module = importlib.import_module(name)
        functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == name]
        jobs.append((module, functions[i % len(functions)]))
with ThreadPoolExecutor(8) as pool:
    counts = list(pool.map(lambda job: ask(*job), jobs))
print(
    f"{len(counts)} answers; prompt tokens {sum(p for p, _ in counts):,}, of them cached {sum(c for _, c in counts):,}"
)
