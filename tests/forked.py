"""Python processes that do not pay for their imports: each is forked from a server that has imported torch and more.

    python forked.py ADDRESS                       the server: imports, prints a line, and serves until its input ends
    python -S forked.py ADDRESS SCRIPT WORDS...    as `python SCRIPT WORDS...` (or `-c CODE`), in this folder, with this
                                                   environment, input, output, signals and exit code

Hugging Face's libraries read the environment when they are imported. So there are two servers, one of them without
them: it serves who has another environment, in what they read, than the servers. A second process, as light as an
interpreter can be, stands for the forked one: signals are passed on, and if it is killed, so is the other.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys

HEAVY = """
numpy pandas pyarrow pyarrow.dataset pyarrow.parquet matplotlib.figure nltk rouge_score.rouge_scorer yaml
aiohttp requests xxhash dill safetensors.torch tokenizers tqdm.auto torch torch._dynamo torch._inductor.compile_fx
torch.distributed.checkpoint torch.distributed.fsdp torch.distributed.optim torch.distributed.tensor
torch.utils.checkpoint torch.utils.tensorboard
"""
HUGGING_FACE = """
bitsandbytes datasets evaluate huggingface_hub accelerate transformers transformers.trainer_seq2seq
transformers.models.t5.modeling_t5 transformers.models.auto.modeling_auto peft peft.tuners.lora.bnb
"""
READ_BY_THEM = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "HOME", "XDG_", "PYTHON", "CUDA_VISIBLE_DEVICES")


def load(names: str) -> None:
    import importlib

    for name in names.split():
        with contextlib.suppress(ImportError):  # where a package is missing, the scripts say so
            importlib.import_module(name)


def serve(address: str) -> None:
    import gc
    import logging

    load(HEAVY)
    if os.fork() == 0:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the script does
        load(HUGGING_FACE)
        with open(address + "-environment", "w") as file:
            json.dump(dict(os.environ), file)
        address += "-hugging-face"
    gc.freeze()  # else collecting in a fork copies all these pages
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            stand_by(connection)  # does not return, but in the process that is to run the script
            return
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def stand_by(connection: socket.socket) -> None:
    """Fork once more and run the script there; here, tell its process id and how it ended, or kill it."""
    data, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    order = json.loads(receive(connection, int.from_bytes(data, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        run(order, descriptors)
        return
    for descriptor in {0, 1, 2, *descriptors}:
        os.close(descriptor)  # who reads from them waits until everybody has
    connection.sendall(pid.to_bytes(8, "big"))
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if select.select([connection], [], [], 0.01)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os._exit(0)
    connection.sendall(ended[1].to_bytes(8, "big"))
    os._exit(0)


def run(order: dict, descriptors: list) -> None:
    import runpy

    os.setsid()
    kinds = [(stream.encoding, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)]
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding=encoding, errors=errors, closefd=False, buffering=1 if number == 2 else -1)  # noqa: SIM115
        for number, mode, (encoding, errors) in zip(range(3), "rww", kinds, strict=True)
    )
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv = order["words"]
    if "NO_PLOTS" in os.environ:  # as in the fixture quick_plots
        from matplotlib.figure import Figure

        Figure.savefig = not_drawn
    if sys.argv[0] == "-c":
        sys.path[0] = ""
        exec(sys.argv.pop(1), {"__name__": "__main__"})
        return
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


def not_drawn(figure: object, file: object, **_: object) -> None:
    """In place of Figure.savefig: a file that says so."""
    if hasattr(file, "write"):
        file.write(b"not drawn")
    else:
        with open(file, "wb") as output:
            output.write(b"not drawn")


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def server_for(address: str, environment: dict[str, str]) -> str:
    """The address of the one with Hugging Face's libraries, if it is there already and would read what we would."""
    with contextlib.suppress(OSError, ValueError):
        with open(address + "-environment") as file:
            its = json.load(file)
        read = [{key: value for key, value in of.items() if key.startswith(READ_BY_THEM)} for of in (its, environment)]
        if read[0] == read[1] and os.path.exists(address + "-hugging-face"):
            return address + "-hugging-face"
    return address


def ask(address: str, words: list[str]) -> None:
    """Have the script run, and end as it does."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server_for(address, dict(os.environ)))
    order = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it is known whom to pass them on to
    socket.send_fds(connection, [len(order).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(order)
    pid = int.from_bytes(receive(connection, 8), "big")
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    status = os.waitstatus_to_exitcode(int.from_bytes(receive(connection, 8), "big"))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


SIGNALS = (signal.SIGINT, signal.SIGTERM)

if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        ask(sys.argv[1], sys.argv[2:])
