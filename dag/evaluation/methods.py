"""Methods by the names of an evaluation's rows: NAME, or NAME:field=value:field=value to change some constants.

The names are those of sample.py and

  dag-joint           reads the same tokens by OVAM's joint min-max instead of their fitted constants
  dag-map             reads them by the min-max of the concept's own map
  dag-paper           has the paper's S = S_area T without a bound. SD 1.4 has that anyway; with the miniature's own
                      constants nearly every pixel is at s_max and the scalers cannot be told apart. So the next two,
                      the ablations of the paper's Table 5, start from this one
  dag-no-area         goes without the AreaScaler
  dag-no-magnitude    goes without the MagnitudeScaler

`none` looks, if there are tokens, but never guides: its pictures are bit for bit those of plain guidance.
The fields of SLD and SEGA are what their constructors take, those of DAG are DAGConfig's and Scaling's.
"""

import math
from dataclasses import asdict, replace

import dag
from dag.cam import AttentionWithMaps
from dag.config import METHODS, Config, DAGConfig, Scaling

from .baselines import by_name, texts_for

FIELDS = ("scale", "threshold", "warmup", "momentum", "beta")  # of SLD and SEGA
DAGS = {  # name -> constants that differ from the model's
    "dag": {}, "dag-sld": {}, "dag-joint": {}, "dag-map": {}, "dag-paper": {},
    "dag-no-area": {"area_gain": None}, "dag-no-magnitude": {"magnitude": 1.0},
}  # fmt: skip
PAPERS = ("dag-paper", "dag-no-area", "dag-no-magnitude")  # start from the paper's scalers
NAMES = tuple(dict.fromkeys([*METHODS, *DAGS]))


def method(
    row: str, model: Config, tokens: list[dag.GuidelineTokens], fused: AttentionWithMaps | None = None
) -> dag.Guidance:
    """The method of a row, on a model. Raises ValueError for an unknown name, field or value: one line."""
    name, *changes = row.split(":")
    if name not in NAMES:
        raise ValueError(f"unknown method '{name}', expected one of {', '.join(NAMES)}")
    if name in DAGS:
        if not tokens:
            raise ValueError(f"{name} looks for something: give --tokens, a file made by train_tokens.py")
        constants = vars(model.dag) | vars(model.dag.scaling)
        if name in PAPERS:
            constants |= asdict(Scaling(min_area=model.dag.scaling.min_area))
        constants |= DAGS[name]
        del constants["scaling"]
    else:
        texts = [t.safety_text for t in tokens] or [model.safety_text]
        rival = by_name(name, texts_for(name, texts, model), tokens)
        constants = {field: getattr(rival, field) for field in FIELDS if hasattr(rival, field)}
    for change in changes:
        field, _, text = change.partition("=")
        if field not in constants:
            fields = f"field=value with one of {', '.join(constants)}" if constants else "the name alone"
            raise ValueError(f"row '{row}': no field '{field}', expected {fields}")
        constants[field] = constant(row, field, text)
    if name == "none" and tokens:
        return dag.DAG(*tokens, cfg=replace(model.dag, warmup=model.schedule.num_timesteps), fused=fused)
    if name not in DAGS:
        return type(rival)(*rival.safety_texts, **constants) if constants else rival
    scaling = Scaling(**{field: constants.pop(field) for field in vars(model.dag.scaling)})
    if name in ("dag-joint", "dag-map"):
        tokens = [replace(t, normalisation=name.removeprefix("dag-")) for t in tokens]
    base = "sld" if name == "dag-sld" else "sega"
    return dag.DAG(*tokens, base=base, cfg=DAGConfig(scaling=scaling, **constants), fused=fused)


def constant(row: str, field: str, text: str) -> int | float | None:
    """The value of a row's field. Raises ValueError for a text that is none."""
    kind, expected = (int, "a whole number") if field == "warmup" else (float, "a number")
    optional = field in ("area_gain", "s_max")
    if optional and text == "none":
        return None
    try:
        if math.isfinite(kind(text)):
            return kind(text)
    except ValueError:
        pass
    raise ValueError(f"row '{row}': {field} is '{text}', expected {expected}{' or none' if optional else ''}")


def described(guidance: dag.Guidance) -> dict:
    """What a method is, for the record: its kind, its texts and its constants."""
    own = {field: getattr(guidance, field) for field in FIELDS if hasattr(guidance, field)}
    if guidance.cfg is not None:
        own = asdict(guidance.cfg) | {"base": guidance.base} | {"readings": [t.normalisation for t in guidance.tokens]}
    texts = list(guidance.safety_texts or filter(None, [guidance.uncond_text]))
    return {"kind": type(guidance).__name__, "safety_texts": texts} | own
