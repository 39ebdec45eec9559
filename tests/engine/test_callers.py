"""Threads and asyncio: a block prunes the calls of its opener and of what was started inside; others are refused."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue

import pytest
import torch
from examples import registered

import prunekit
from prunekit.testing.tiny import tiny_inputs, tiny_llava

FASTV = {"stages": [{"use": "fastv", "at": 2, "keep": 0.4}]}
DENSE = {"stages": [{"use": "dense"}]}
TOWER = {"stages": [{"use": "ex_loud", "at": "vision.0", "keep": 0.5}]}
CALL = "this call comes from outside of the prunekit.apply block"
BLOCK = "whose stages would act here as well"
CHANGED = "was opened or left on this model while a call of it ran"
INPUTS = tiny_inputs()


@pytest.fixture
def model():
    return tiny_llava()


@pytest.fixture
def dense(model):
    return model(**INPUTS).logits


@pytest.fixture
def pruned(model, dense):
    with prunekit.apply(model, FASTV):
        logits = model(**INPUTS).logits
    assert not torch.equal(logits, dense)
    return logits


class Worker:
    """A thread that was there before; it does what it is given, in a context of its own."""

    def __enter__(self):
        self.jobs, self.results = SimpleQueue(), SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.jobs.put(None)
        self.thread.join(60)
        assert not self.thread.is_alive()

    def _run(self):
        while (job := self.jobs.get()) is not None:
            try:
                self.results.put((job(), None))
            except Exception as error:
                self.results.put((None, error))

    def start(self, job):
        self.jobs.put(job)

    def result(self):
        value, error = self.results.get(timeout=60)
        if error is not None:
            raise error
        return value

    def do(self, job):
        self.start(job)
        return self.result()


def in_thread(job, kind=threading.Thread):
    """What `job` returns in a thread that is made and started here."""
    found = []
    thread = kind(target=lambda: found.append(job()))
    thread.start()
    thread.join(60)
    return found[0]


class Own(threading.Thread):
    """A thread of somebody's own class."""

    def __init__(self, target):
        super().__init__()
        self.job = target

    def run(self):
        self.job()


def timer(target):
    return threading.Timer(0, target)


def test_a_streamer_gets_what_generate_writes_in_a_thread(model):
    """As `TextIteratorStreamer` is used: `generate` runs in a thread, the owner of the block reads along."""
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self):
            self.queue = SimpleQueue()

        def put(self, value):
            self.queue.put(value)

        def end(self):
            self.queue.put(None)

    options = {**INPUTS, "max_new_tokens": 5, "do_sample": False}
    with prunekit.apply(model, FASTV) as run:
        expected = model.generate(**options)
        first, streamer = run.report, Streamer()
        thread = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer})
        thread.start()
        streamed = list(iter(lambda: streamer.queue.get(timeout=60), None))
        thread.join(60)
        assert run.report is not first and run.report == first
    assert torch.equal(torch.cat([part.flatten() for part in streamed]), expected[0])


@pytest.mark.parametrize("kind", [threading.Thread, Own, timer], ids=["thread", "subclass", "timer"])
def test_threads_that_are_started_inside(model, pruned, kind):
    with prunekit.apply(model, FASTV):
        assert torch.equal(in_thread(lambda: model(**INPUTS).logits, kind), pruned)
        twice = in_thread(lambda: in_thread(lambda: model(**INPUTS).logits), kind)
        assert torch.equal(twice, pruned)
        with ThreadPoolExecutor(2) as pool:
            assert all(torch.equal(one, pruned) for one in pool.map(lambda _: model(**INPUTS).logits, range(3)))


@pytest.mark.parametrize("way", ["forward", "generate", "decoder"])
def test_a_thread_of_somebody_else_is_refused(model, dense, pruned, way):
    ran = []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    calls = {
        "forward": lambda: model(**INPUTS),
        "generate": lambda: model.generate(**INPUTS, max_new_tokens=2),
        "decoder": lambda: model.get_decoder()(inputs_embeds=torch.zeros(1, 3, model.config.text_config.hidden_size)),
    }
    with Worker() as other:
        with prunekit.apply(model, FASTV) as run:
            kept = model(**INPUTS).logits
            before, report = len(ran), run.report
            with pytest.raises(prunekit.Unsupported, match=CALL):
                other.do(calls[way])
            assert len(ran) == before, "nothing was computed"
            assert run.report is report
        assert torch.equal(kept, pruned)
        assert torch.equal(other.do(lambda: model(**INPUTS).logits), dense)


def test_a_thread_of_somebody_else_gets_no_image_through_a_cut_tower(model):
    with registered(), Worker() as other, prunekit.apply(model, TOWER):
        with pytest.raises(prunekit.Unsupported, match=CALL):
            other.do(lambda: model.model.get_image_features(INPUTS["pixel_values"]))
        model(**INPUTS)


def test_where_nothing_is_pruned_nobody_is_refused(model, dense):
    with Worker() as other, prunekit.apply(model, DENSE) as run:
        assert torch.equal(other.do(lambda: model(**INPUTS).logits), dense)
        assert run.report is None, "it was not of this block"
        assert torch.equal(model(**INPUTS).logits, dense) and run.report is not None


def test_a_shared_block_is_for_all(model, pruned):
    with Worker() as other, prunekit.apply(model, FASTV, shared=True):
        assert torch.equal(other.do(lambda: model(**INPUTS).logits), pruned)
        # What is opened inside is for its owner, and others wait until it is left.
        with prunekit.apply(model, {"stages": [{"use": "skip_layers", "layers": [4]}]}):
            with pytest.raises(prunekit.Unsupported, match=CALL):
                other.do(lambda: model(**INPUTS))
            assert not torch.equal(model(**INPUTS).logits, pruned)
        assert torch.equal(other.do(lambda: model(**INPUTS).logits), pruned)


def test_a_second_block_of_somebody_else_is_refused(model, dense, pruned):
    def opened():
        with prunekit.apply(model, FASTV):
            return model(**INPUTS).logits

    with Worker() as other:
        for owner in (FASTV, DENSE):
            with prunekit.apply(model, owner), pytest.raises(prunekit.Unsupported, match=BLOCK):
                other.do(opened)
        assert torch.equal(model(**INPUTS).logits, dense)
        assert torch.equal(other.do(opened), pruned)


def test_a_server_with_a_block_for_each_request(model, dense, pruned):
    """At once they are refused or right, never wrong; taking turns all are right."""
    turns, begin, done = threading.Lock(), threading.Barrier(4, timeout=60), []

    def request(lock):
        begin.wait()
        try:
            with lock, prunekit.apply(model, FASTV):
                done.append(model(**INPUTS).logits)
        except prunekit.Unsupported as error:
            assert BLOCK in str(error)
            done.append(None)

    for locks in ([threading.Lock() for _ in range(4)], [turns] * 4):
        done.clear()
        threads = [threading.Thread(target=request, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        answers = [one for one in done if one is not None]
        assert len(done) == 4 and answers and all(torch.equal(one, pruned) for one in answers)
    assert len(answers) == 4
    assert torch.equal(model(**INPUTS).logits, dense)


def test_tasks(model, pruned):
    """Those made inside carry the block, also into threads; one that was made before does not."""

    async def call():
        await asyncio.sleep(0)
        return model(**INPUTS).logits

    async def early(opened):
        await opened.wait()
        with pytest.raises(prunekit.Unsupported, match=BLOCK), prunekit.apply(model, FASTV):
            pass
        with pytest.raises(prunekit.Unsupported, match=CALL):
            model(**INPUTS)

    async def main():
        opened, loop = asyncio.Event(), asyncio.get_running_loop()
        before = asyncio.create_task(early(opened))
        await asyncio.sleep(0)
        with ThreadPoolExecutor(1) as pool:
            await loop.run_in_executor(pool, int)
            with prunekit.apply(model, FASTV):
                opened.set()
                await before
                found = [*await asyncio.gather(call(), call()), await asyncio.to_thread(lambda: model(**INPUTS).logits)]
                with pytest.raises(prunekit.Unsupported, match=CALL):
                    await loop.run_in_executor(pool, lambda: model(**INPUTS))
                here = contextvars.copy_context()
                found.append(await loop.run_in_executor(pool, lambda: here.run(lambda: model(**INPUTS).logits)))
        return found

    found = asyncio.run(main())
    assert len(found) == 4 and all(torch.equal(one, pruned) for one in found)
    with prunekit.apply(model, FASTV):
        assert torch.equal(asyncio.run(call()), pruned)


def test_tasks_that_open_blocks_inside_one(model):
    """Each would prune what the other computes."""

    async def inner(first, second):
        with prunekit.apply(model, {"stages": [{"use": "skip_layers", "layers": [4]}]}):
            first.set()
            await second.wait()

    async def main():
        first, second = asyncio.Event(), asyncio.Event()
        with prunekit.apply(model, FASTV):
            task = asyncio.create_task(inner(first, second))
            await first.wait()
            with pytest.raises(prunekit.Unsupported, match=CALL):
                model(**INPUTS)
            with pytest.raises(prunekit.Unsupported, match=BLOCK), prunekit.apply(model, FASTV):
                pass
            second.set()
            await task
            model(**INPUTS)

    asyncio.run(main())


def test_a_block_may_be_left_elsewhere(model, dense, pruned):
    """As a generator does that several threads read from."""

    def answers():
        with prunekit.apply(model, FASTV):
            yield model(**INPUTS).logits

    with Worker() as other:
        reading = answers()
        assert torch.equal(next(reading), pruned)
        other.do(reading.close)
        assert torch.equal(other.do(lambda: model(**INPUTS).logits), dense)
        with prunekit.apply(model, FASTV):
            assert torch.equal(model(**INPUTS).logits, pruned)
    assert torch.equal(model(**INPUTS).logits, dense)


@pytest.mark.parametrize("way", ["opened", "left"])
def test_a_call_that_meets_a_change_is_refused(model, way):
    """A block that begins or ends while a thread computes: in some layers one thing would act, in others another."""
    arrived, go_on = threading.Event(), threading.Event()

    def stop(*_):
        arrived.set()
        assert go_on.wait(60)

    skip = {"stages": [{"use": "skip_layers", "layers": [4]}]}  # with it no shape would tell
    with ExitStack() as blocks, ThreadPoolExecutor(1) as pool:
        blocks.enter_context(prunekit.apply(model, skip))
        hook = model.get_decoder().layers[1].register_forward_pre_hook(stop)
        call = pool.submit(model, **INPUTS)
        assert arrived.wait(60)
        if way == "left":
            blocks.close()
        else:
            blocks.enter_context(prunekit.apply(model, FASTV))
        go_on.set()
        with pytest.raises(prunekit.Unsupported, match=CHANGED):
            call.result(60)
        hook.remove()


def test_a_dense_call_that_was_running_stays_dense(model, dense):
    arrived, go_on = threading.Event(), threading.Event()

    def stop(*_):
        arrived.set()
        assert go_on.wait(60)

    with Worker() as other:
        hook = model.get_decoder().layers[1].register_forward_pre_hook(stop)
        other.start(lambda: model(**INPUTS).logits)
        assert arrived.wait(60)
        with prunekit.apply(model, FASTV):
            go_on.set()
            assert torch.equal(other.result(), dense)
        hook.remove()


def test_nothing_is_left_behind(model):
    before = threading.Thread.__dict__["start"]
    with pytest.raises(KeyError), prunekit.apply(model, FASTV), prunekit.apply(model, FASTV):
        assert threading.Thread.__dict__["start"] is not before
        raise KeyError
    assert threading.Thread.__dict__["start"] is before
    with (
        pytest.raises(prunekit.SpecError),
        prunekit.apply(model, {"stages": [{"use": "fastv", "at": 99, "keep": 0.5}]}),
    ):
        pass
    assert threading.Thread.__dict__["start"] is before
    outlived = threading.Thread(target=lambda: None)
    outlived.start()
    assert not any(name.startswith("_prunekit") for name in vars(outlived)), "no block was open"


def test_what_others_put_on_top_stays(model):
    before = threading.Thread.__dict__["start"]
    with prunekit.apply(model, FASTV):
        ours = threading.Thread.__dict__["start"]
        theirs = lambda self: ours(self)  # noqa: E731
        threading.Thread.start = theirs
    try:
        assert threading.Thread.__dict__["start"] is theirs
        assert in_thread(lambda: 1) == 1
    finally:
        threading.Thread.start = before


def test_copies_of_data_parallel_are_refused(model):
    """They are made where several GPUs are; here it is asked for one as `torch.nn.DataParallel` does."""
    with (
        prunekit.apply(model, FASTV),
        pytest.raises(prunekit.Unsupported, match="DataParallel copies the model on every call"),
    ):
        for module in model.modules():
            module._replicate_for_data_parallel()
