"""What train_tokens.py does: pictures are drawn or read, annotated, mined; tokens are trained on them and measured."""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dag.config import SHAPES, STEPS
from dag.tokens import GuidelineTokens
from weights.optimisation import PAPER, Recipe, optimise, optimise_paper, raise_lo
from weights.queries import CONCEPT, AnnotatedQueries, Seen, choose

from . import setup
from .annotations import (
    STRIDE,
    Job,
    Prompts,
    cost,
    draw,
    from_noised,
    nothing_yet,
    on_grid,
    progress,
    read_folder,
    save,
)
from .annotators import annotator
from .parsing import UsageError, slug, warn

HELD_OUT = 24  # pictures of the concept and of each kind of look-alike that the judge measures on
MINING = 1 / 3  # of the steps of training: so many show what is confused
EAGER = 2  # the least weight of the concept's pixels while mining: what finds more shows more of what is confused
PAPER_STEPS = 100  # of the paper's recipe, per unsafe picture


class Training:
    """One run of train_tokens.py: the model, what the tokens start from, and the pictures there are so far.

    Raises UsageError, ValueError and TokenError for whatever cannot be used, before anything is drawn.
    """

    def __init__(self, args: argparse.Namespace):
        setup.writable(args.out.parent)
        self.args, (self.sd, *_) = args, setup.open_model(args)
        self.before = self.start()
        self.scaling = self.before.adapt(self.sd.config.dag.scaling)
        self.folder, self.pictures = args.out.with_suffix(""), torch.empty(0)
        if args.data is not None:
            return
        if (self.folder / "captions.json").exists():
            raise UsageError(
                f"{self.folder}: has pictures already; train on them with --data {self.folder}, remove it, or name "
                "another --out"
            )
        self.annotate = annotator(args, self.sd, self.before.concept)
        self.prompts = Prompts(args, self.sd, self.before.concept)

    def start(self) -> GuidelineTokens:
        """The tokens to start from: the concept's text, or those of --tokens."""
        args, sd = self.args, self.sd
        if args.tokens is not None:
            tokens = GuidelineTokens.load(args.tokens)
            if args.normalisation == "fitted" and not tokens.levels:
                raise UsageError(f"--normalisation fitted: {args.tokens} has no constants; expected joint or map")
            if message := tokens.check(sd):
                warn(message)
            return tokens
        concept = SHAPES.concept if args.concept is None else args.concept
        known = sd.config.safety_text if slug(concept) == slug(sd.config.concept) else concept
        safety_text = known if args.safety_text is None else args.safety_text
        setup.check_text(sd, "--concept", concept)
        setup.check_text(sd, "--safety-text", safety_text)
        tokens = replace(GuidelineTokens.from_text(sd, concept, safety_text), min_area=args.min_area)
        return tokens if args.normalisation == "fitted" else replace(tokens, normalisation=args.normalisation)

    def collect(self) -> None:
        """The pictures to train on, and their queries: those of --data, or drawn ones and what was mined."""
        if self.args.data is not None:
            return self.read()
        try:
            self.draw()
            for k in range(1, self.args.rounds + 1):
                if not self.mine(self.train(self.data, f"tokens {k}", MINING, EAGER), k):
                    break
        except KeyboardInterrupt:
            if (self.folder / "captions.json").exists():
                warn(f"the pictures so far stay; --data {self.folder} trains on them")
            raise

    def read(self) -> None:
        """The pictures of --data."""
        args, sd = self.args, self.sd
        self.pictures, masks, jobs, seeded = read_folder(args.data, sd)
        self.data = nothing_yet(sd, self.before.reading, *self.pictures.shape[2:])
        if not seeded:
            print("queries from the pictures with noise added (captions.json has no seed for every picture)")
            room = from_noised(sd, self.data, self.pictures, jobs, args.out.parent)
            return self.data.add(room, masks, [job.kind for job in jobs])
        print("queries along the trajectories of the captions' prompts and seeds")
        for part, again, found in self.drawn(jobs, "trajectories"):
            at = slice(len(self.data), len(self.data) + len(part))
            apart = (again - self.pictures[at]).abs().mean((1, 2, 3)) / 2  # (batch,)
            if apart.max() > 0.05:
                raise ValueError(
                    f"{args.data / part[int(apart.argmax())].name}: is not what its prompt and seed draw in {STEPS} "
                    f"steps at scale {sd.config.scale:g} (off by {apart.max():.0%}); leave seeds out of captions.json"
                )
            self.data.add(found.queries, masks[at], found.kinds)

    def drawn(
        self, jobs: list[Job], title: str, passing: bool = False
    ) -> Iterator[tuple[list[Job], Tensor, AnnotatedQueries]]:
        return draw(self.sd, self.data, jobs, self.args.out.parent, self.args.batch_size, title, passing)

    def draw(self) -> None:
        """The first pictures. Those of the concept in which the annotator does not see it are left out."""
        args, side = self.args, self.sd.config.size
        self.data = nothing_yet(self.sd, self.before.reading, side, side)
        total = args.n_unsafe + args.n_safe
        print(cost(self.sd, self.data, total, args.batch_size, args.rounds, args.n_safe, args.out.parent))
        kinds = [self.prompts.kinds[i % len(self.prompts.kinds)] for i in range(args.n_safe)]
        jobs = self.prompts.jobs([CONCEPT] * args.n_unsafe, "concept") + self.prompts.jobs(kinds, "look-alike")
        for part, pictures, found in self.drawn(jobs, "pictures"):
            masks = self.masks(pictures, found)  # (batch, height, width)
            save(self.folder, part, pictures, masks)
            self.keep([i for i, job in enumerate(part) if job.kind != CONCEPT or masks[i].max() > 0], pictures, found)
        if not self.data.unsafe.any():
            raise ValueError(
                f"--annotator {args.annotator}: none of {args.n_unsafe} pictures shows '{self.before.concept}'; they "
                f"stay in {self.folder}: look at them, and paint masks for --data or try another annotator"
            )
        if left := total - len(self.data):
            warn(f"{left} of {args.n_unsafe} pictures of the concept are left out: the annotator does not see it there")

    def masks(self, pictures: Tensor, found: AnnotatedQueries) -> Tensor:
        """Masks of a batch, (batch, height, width); sets those of its queries, too.

        Of look-alikes they are empty by their prompts: only the judge can tell them from the concept.
        """
        asked = torch.tensor([kind == CONCEPT or self.args.annotator == "judge" for kind in found.kinds])
        masks = torch.zeros(len(pictures), *pictures.shape[2:])
        if asked.any():
            masks[asked] = self.annotate(pictures[asked], found.subset(asked.nonzero()[:, 0].tolist()))
        found.masks = on_grid(self.sd, masks)
        return masks

    def keep(self, images: list[int], pictures: Tensor, found: AnnotatedQueries) -> None:
        """Train on some of a batch, too."""
        self.data.merge(found.subset(images))
        self.pictures = torch.cat([self.pictures, pictures[images]]) if len(self.pictures) else pictures[images]

    def mine(self, tokens: GuidelineTokens, k: int) -> bool:
        """Round k: draw more look-alikes, keep those that the tokens take for the concept; were there any?

        Kinds that were confused before are drawn more often.
        """
        before, rng, confused = Counter(self.data.kinds), random.Random(self.args.seed + k), Counter()
        more = rng.choices(self.prompts.kinds, [1 + before[kind] for kind in self.prompts.kinds], k=self.args.n_safe)
        jobs = self.prompts.jobs([*self.prompts.kinds, *more][: self.args.n_safe], f"mined-{k}")
        for part, pictures, found in self.drawn(jobs, f"round {k}", passing=True):
            masks = self.masks(pictures, found)  # (batch, height, width)
            seen = self.late(found.measure(tokens, self.scaling)["fitted"])
            wrong = ((seen.acts.amax(0) > 0) & ~found.unsafe).nonzero()[:, 0].tolist()
            if wrong:
                save(self.folder, [part[i] for i in wrong], pictures[wrong], masks[wrong])
                room = self.data.room(len(wrong), self.args.out.parent)  # of their own: the next batch needs the other
                for own, i in zip(room, wrong, strict=True):
                    found.queries[i] = own.copy_(found.queries[i])
                self.keep(wrong, pictures, found)
                confused.update(part[i].kind for i in wrong)
        told = ": " + listed(confused) if confused else ""
        print(f"mining, round {k}: {confused.total()} of {len(jobs)} look-alikes were taken for the concept{told}")
        return bool(confused)

    def train(self, data: AnnotatedQueries, title: str, share: float = 1.0, weight: float = 0.0) -> GuidelineTokens:
        """The tokens that the recipe makes of the data, in a share of its steps; weight: of the concept, at least."""
        paper = self.args.recipe == "paper"
        recipe = replace(PAPER, steps=PAPER_STEPS * int(data.unsafe.sum())) if paper else Recipe()
        steps = max(1, round(share * (self.args.steps or recipe.steps)))
        recipe = replace(recipe, steps=steps, weight=max(weight, self.args.weight or recipe.weight))
        losses = (optimise_paper if paper else optimise)(data, self.before, recipe, self.args.seed)
        bar, after = progress(losses, title, recipe.steps), self.before
        for _, best in bar:
            if best is not None:
                after = best
                bar.set_postfix(loss=f"{after.loss:.4f}")
        return after if paper else raise_lo(data, after)

    def held_out(self, tokens: GuidelineTokens) -> tuple[str, dict[str, Seen], AnnotatedQueries]:
        """What is detected in pictures that were not trained on: in words, what `measure` finds, and the pictures.

        With the judge they are drawn anew; else the pictures take turns, and tokens are trained without them.
        """
        args, data = self.args, self.data
        if args.data is None and args.annotator == "judge":
            other = argparse.Namespace(**vars(args) | {"seed": args.seed + 77})
            prompts, on = Prompts(other, self.sd, self.before.concept), data.subset([])
            for _, pictures, found in self.drawn(prompts.jobs(HELD_OUT * [CONCEPT, *prompts.kinds], ""), "held out"):
                self.masks(pictures, found)
                on.merge(found.subset([i for i, kind in enumerate(found.kinds) if kind != CONCEPT or found.unsafe[i]]))
            return f"{len(on)} held-out pictures, masks by the judge", on.measure(tokens, self.scaling), on
        unsafe, safe = (at.nonzero()[:, 0].tolist() for at in (data.unsafe, ~data.unsafe))
        if args.tokens is not None or len(unsafe) < 2:
            return f"{len(data)} pictures, none of them held out", data.measure(tokens, self.scaling), data
        order, parts = unsafe + safe, []
        folds = len(order) if len(order) <= 16 else 4
        for k in range(folds):
            rest = data.subset([i for j, i in enumerate(order) if j % folds != k])
            without = self.train(rest, f"without part {k + 1} of {folds}")
            parts.append(data.subset(order[k::folds]).measure(without, self.scaling))
        joined = {how: zip(*(part[how] for part in parts), strict=True) for how in parts[0]}
        measured = {how: Seen(*(torch.cat(values, 1) for values in fields)) for how, fields in joined.items()}
        on = data.subset([i for k in range(folds) for i in order[k::folds]])
        return f"{len(on)} pictures, each held out of one of {folds} trainings", measured, on

    def late(self, seen: Seen) -> Seen:
        """From the first level after warm-up on."""
        return Seen(*(values[-(-self.sd.config.dag.warmup // STRIDE) :] for values in seen))

    def told(self) -> str:
        """What there is to train on."""
        unsafe = self.data.unsafe
        if unsafe.all():
            warn("no safe picture: nothing teaches the tokens what is not the concept; add some look-alikes")
        kinds = Counter(kind for kind, own in zip(self.data.kinds, unsafe.tolist(), strict=True) if not own)
        told = f" ({listed(kinds)})" if len(kinds) > 1 else ""
        return f"{int(unsafe.sum())} unsafe and {kinds.total()} safe pictures{told}"

    def tell(self, measured: dict[str, Seen], on: AnnotatedQueries, how: str) -> None:
        """Print what was measured: under every normalisation, by kind, and last of all one line to hand on."""
        scaling, unsafe, summary = self.scaling, on.unsafe, []
        heads = "found", f"A >= {scaling.edit:g}", f"A >= {scaling.unsafe:g}", "guided"
        print("IoU in unsafe pictures. In unsafe / safe ones, shares of pictures in which something is found, of the")
        less = f"{heads[1]} on < {scaling.full:.0%}"
        print(f"frame with {heads[1]} and {heads[2]}, of pictures that would be guided: something found, {less}.")
        print("normalisation   t   IoU " + "".join(f"{head:>13}" for head in heads))
        for reading, seen in measured.items():
            u, s = seen.of(unsafe), seen.of(~unsafe)
            for k in range(0, len(on.times), 4):
                cells = [f"{a[k].mean():.2f} / {b[k].mean():.2f}" for a, b in zip(u[1:], s[1:], strict=True)]
                print(f"{reading:13} {on.times[k]:3d}  {u.iou[k].mean():.2f}  {'  '.join(cells)}")
            shares = [f"{head} {a.mean():.2f}/{b.mean():.2f}" for head, a, b in zip(heads, u[1:], s[1:], strict=True)]
            summary.append(f"{reading} IoU {u.iou.mean():.2f}, {', '.join(shares)}")
        seen, worst = self.late(measured[how]), []
        print(f"Read by {how}, after warm-up: pictures / falsely guided at any level / at a level in the mean")
        for kind in dict.fromkeys(on.kinds):
            at = torch.tensor([kind == other for other in on.kinds]) & ~unsafe
            if at.any():
                acts = seen.of(at).acts
                worst.append((acts.amax(0).mean().item(), kind))
                print(f"{kind:26} {int(at.sum()):4d} / {worst[-1][0]:.2f} / {acts.mean():.2f}")
        u, clear = seen.of(unsafe), [t <= 501 for t in on.times[-len(seen.iou) :]]
        iou = f"IoU {u.iou.mean():.2f}, {u.iou[clear].mean():.2f} at t <= 501"
        print(f"{'the concept':26} {int(unsafe.sum()):4d}, found at {u.acts.mean():.2f} of the levels, {iou}")
        if worst:
            print("worst kind of look-alike: {1}, {0:.2f} falsely guided".format(*max(worst)))
        best = choose(measured, unsafe)
        advice = f"choose {best}" if best else "none of them guides, train with the default recipe"
        print(f"mean of all t: {'; '.join(summary)}. Read by {how}; {advice}")


def listed(kinds: Counter) -> str:
    """4 red square, 1 red star."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
