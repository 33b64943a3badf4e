"""Stage 1 at scale, against a stub server: memory while the questions stream, and slots in use.

    python tests/bench_ei.py 100000

Each question is one request (R1, declined). Prints the process's peak memory after every tenth of
the questions, and questions a second; then the slots of a slower server that were busy on average.
"""
import contextlib
import http.server
import io
import json
import os
import resource
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE)]

import ei


class Stub(http.server.BaseHTTPRequestHandler):
    """Declines after `delay` seconds; `slots` answers at a time, and how long they were busy."""
    protocol_version = "HTTP/1.1"
    body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "DECLINE"}}]}).encode()
    delay, slots, busy = 0.0, threading.Semaphore(16), []

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.slots:
            start = time.perf_counter()
            time.sleep(self.delay)
            self.busy.append(time.perf_counter() - start if self.delay else 0)
        # one write, or the client waits for the second packet
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(self.body) + self.body)


def serve():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def run(url, n, folder):
    """n questions through the command -> seconds; a line of memory every tenth."""
    data, out = os.path.join(folder, f"q{n}.jsonl"), os.path.join(folder, f"p{n}.jsonl")
    with open(data, "w") as file:
        for i in range(n):
            row = {"id": f"q{i}", "question": f"What is {i} and 1?", "answer": str(i + 1),
                   "answer_type": "number", "rationale": "Add."}
            file.write(json.dumps(row) + "\n")
    sys.argv = ["ei.py", "--teacher", url, "--data", data, "--out", out, "--rules", "R1",
                "--concurrency", "16"]
    select, done = ei.select, [0]

    def counted(student, lines, tau_hard):
        done[0] += 1
        if done[0] % max(1, n // 10) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{done[0]:9,} questions: {peak:.0f} MiB", file=sys.__stdout__, flush=True)
        return select(student, lines, tau_hard)
    ei.select, start = counted, time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ei.main()
    ei.select = select
    return time.perf_counter() - start


if __name__ == "__main__":
    n = int(sys.argv[1])
    os.environ.pop("HF_HUB_OFFLINE", None)
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(serve(), n, folder)
        print(f"{n / seconds:.0f} questions a second")
        Stub.delay, Stub.busy = 0.2, []
        seconds = run(serve(), 800, folder)
        print(f"slots in use: {sum(Stub.busy) / seconds:.1f} of 16 on average, {seconds:.1f} s")
