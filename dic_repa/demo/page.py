"""The page: Gradio's components around `Models` and `play`."""

from __future__ import annotations

import inspect
import os
import random
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib import resources
from typing import Any

from dic_repa.demo.models import Fit, Models
from dic_repa.demo.pictures import draw_page
from dic_repa.demo.play import MOST_IMAGES, NO_CLASS, Wish, play
from dic_repa.errors import UserError, first_line, full_memory
from dic_repa.samplers import solver_info

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, too

import gradio as gr

FONTS = ("system-ui", "sans-serif")
CODE_FONTS = ("ui-monospace", "monospace")
HINT = '<div class="dic-hint">Choose what to sample, then press <b>Sample</b>.</div>'
BUSY = '<div class="dic-hint">Another window is sampling; yours comes next.</div>'
# On a phone the results are below the choices.
SHOW_RESULTS = """(...choices) => {
  if (innerWidth < 800) document.querySelector(".dic-results").scrollIntoView({behavior: "smooth"});
  return choices;
}"""


def fitting(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that this release of Gradio takes here."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


def looks() -> dict[str, Any]:
    """Theme and style: arguments of `Blocks` before Gradio 6, and of `mount_gradio_app` since then."""
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=CODE_FONTS)
    return {"theme": theme, "css": (resources.files("dic_repa.demo") / "assets/page.css").read_text()}


@contextmanager
def said_in_the_page() -> Iterator[None]:
    """Any error becomes a message in the page; what is no user's mistake is also printed."""
    try:
        yield
    except UserError as error:
        raise _message(str(error)) from None
    except Exception as error:
        if memory := full_memory(error):
            raise _message(f"{memory}; choose fewer images") from None
        traceback.print_exc()
        raise _message(f"{type(error).__name__}: {first_line(error)} (more in the terminal)") from None


def _message(text: str) -> gr.Error:
    return gr.Error(escape(text), duration=20, print_exception=False)  # Gradio takes it for HTML


class Page:
    """The page and what its buttons do. One sampling at a time; others wait in Gradio's queue."""

    def __init__(self, models: Models):
        self.models = models
        self._stops: dict[str, threading.Event] = {}  # of the sessions that sample
        before_6 = {} if "theme" in inspect.signature(gr.mount_gradio_app).parameters else looks()
        with gr.Blocks(title="dic-repa demo", analytics_enabled=False, **before_6) as self.blocks:
            self._lay_out(models.fit(models.first))
        self.blocks.queue(default_concurrency_limit=1, max_size=32)

    def _lay_out(self, fit: Fit) -> None:
        where = "a GPU" if self.models.device.type == "cuda" else "the CPU"
        names = ", ".join(map(str, self.models.first))
        gr.HTML(f"<h1>dic-repa</h1><p>{escape(names)} on {where}</p>", elem_classes="dic-head")
        with gr.Row():
            with gr.Column(scale=1, min_width=310, elem_classes="dic-choices"):
                choices = self._choices(fit)
                with gr.Row():
                    stop = gr.Button("Stop", min_width=80, scale=1)
                    start = gr.Button("Sample", variant="primary", min_width=120, scale=2)
            with gr.Column(scale=3, min_width=310):
                results = gr.HTML(HINT, elem_classes="dic-results")
                command = gr.Code(
                    label="The same on the command line", language="shell", interactive=False, lines=1,
                    wrap_lines=True, show_line_numbers=False, visible=False,
                )  # fmt: skip
        start.click(self.say_if_busy, None, results, queue=False, show_progress="hidden")
        start.click(
            self.sample, choices, [results, command], show_progress="hidden", concurrency_id="device",
            concurrency_limit=1, trigger_mode="once", api_name="sample", js=SHOW_RESULTS,
        )  # fmt: skip
        stop.click(self.stop, None, None, queue=False, show_progress="hidden", api_name="stop")
        chosen, classes, solver, steps, tolerance, guidance = (*choices[:2], *choices[3:6], choices[6:9])
        chosen.change(
            self.refit, [chosen, classes, solver, choices[6]], [classes, solver, *guidance], show_progress="hidden",
            concurrency_limit=None,
        )  # fmt: skip
        solver.change(
            self.describe, solver, [solver, steps, tolerance], show_progress="hidden", concurrency_limit=None,
        )  # fmt: skip

    def _choices(self, fit: Fit) -> list[Any]:
        """The components, in the order of `sample`'s arguments."""
        recipe, guidance = fit.settings, fit.settings.guidance
        titles, adaptive = list(self.models.paths), solver_info(recipe.solver).kind == "adaptive"
        models = gr.Dropdown(
            titles, value=self.models.first, multiselect=True, label="Checkpoints", visible=len(titles) > 1,
            info="Several are shown side by side.",
        )  # fmt: skip
        classes = gr.Dropdown(
            _offered(fit), value=[], multiselect=True, label=fit.choices.capitalize(), visible=bool(fit.classes),
            info="None chosen: all in turn.",
        )  # fmt: skip
        num = gr.Slider(1, MOST_IMAGES, value=min(20, recipe.num), step=1, label="Images")
        solver = gr.Dropdown(list(fit.solvers), value=next(iter(fit.solvers)), label="Solver",
                             info=fit.solvers[next(iter(fit.solvers))])  # fmt: skip
        steps = gr.Slider(1, 250, value=recipe.steps or 50, step=1, label="Steps", visible=not adaptive)
        tolerance = gr.Number(recipe.rtol or 1e-5, label="Tolerance", visible=adaptive,
                              info="Smaller: more accurate, and more steps.")  # fmt: skip
        low, high = guidance.interval if guidance else (0.0, 1.0)
        scale = gr.Slider(
            0, 8, value=guidance.scale if guidance and fit.guided else 1, step=0.05, label="Guidance (1: none)",
            visible=fit.guided,
        )  # fmt: skip
        with gr.Row():
            limits: dict[str, Any] = {"minimum": 0, "maximum": 1, "step": 0.05, "min_width": 110, "visible": fit.guided}
            begin = gr.Number(low, label="Guided from t", **limits)
            end = gr.Number(high, label="to t", **limits)
        with gr.Row(elem_classes="dic-seed"):
            seed = gr.Number(recipe.seed, label="Seed", precision=0, minimum=0, min_width=110)
            another = gr.Button("New seed", size="md", min_width=110)
        another.click(lambda: random.randrange(10**6), None, seed, queue=False, show_progress="hidden")
        return [models, classes, num, solver, steps, tolerance, scale, begin, end, seed]

    def sample(
        self, models: list[str], classes: list[str], num: int, solver: str, steps: int, tolerance: float, scale: float,
        begin: float, end: float, seed: int, request: gr.Request,
    ) -> Iterator[tuple[str, Any]]:  # fmt: skip
        """The page's pictures and the command lines, again whenever there is more to show."""
        stop = self._stops[str(request.session_hash)] = threading.Event()
        wish = Wish(models, classes or (), num, solver, steps, tolerance, scale, (begin, end), seed)
        try:
            with said_in_the_page():
                for shown in play(self.models, wish, stop):
                    lines = "\n".join(one.command for one in shown)
                    yield draw_page(shown), gr.update(value=lines, visible=True)
        finally:
            self._stops.pop(str(request.session_hash), None)

    def say_if_busy(self, request: gr.Request) -> Any:
        """A line instead of the results while another window samples."""
        busy = self._stops and str(request.session_hash) not in self._stops
        return BUSY if busy else gr.skip()

    def stop(self, request: gr.Request) -> None:
        """End what this session samples, after the evaluation at work."""
        if stop := self._stops.get(str(request.session_hash)):
            stop.set()

    def stop_all(self) -> None:
        """End all sampling, and wait for it a few seconds."""
        for stop in list(self._stops.values()):
            stop.set()
        self.models.at_work.acquire(timeout=5)

    def refit(self, models: list[str], classes: list[str], solver: str, scale: float) -> list[Any]:
        """What can be chosen for these checkpoints; what was chosen stays where it can."""
        with said_in_the_page():
            fit = self.models.fit(models)
        kept = [name for name in classes or () if name in _offered(fit)]
        solver = solver if solver in fit.solvers else next(iter(fit.solvers))
        return [
            gr.update(choices=_offered(fit), value=kept, visible=bool(fit.classes)),
            gr.update(choices=list(fit.solvers), value=solver),
            gr.update(value=scale if fit.guided else 1, visible=fit.guided),
            gr.update(visible=fit.guided),
            gr.update(visible=fit.guided),
        ]

    def describe(self, solver: str) -> list[Any]:
        """What the solver is, and steps or a tolerance, whichever it takes."""
        with said_in_the_page():
            info = solver_info(solver)
        adaptive = info.kind == "adaptive"
        return [gr.update(info=info.description), gr.update(visible=not adaptive), gr.update(visible=adaptive)]


def _offered(fit: Fit) -> list[str]:
    return [NO_CLASS] * fit.null + fit.classes
