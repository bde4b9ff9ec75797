"""Every knob changes the components that it is for. A knob without a case fails, and so does one that is not passed on."""

import json
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import nn

from bundle.config import WORKFLOWS, knobs
from bundle.errors import UserError
from bundle.names import TASKS
from bundle.training import curriculum

ROOT = Path(__file__).parents[1]
FILES = {
    "train": ["train", "preset_smoke"],
    "evaluate": ["train", "preset_smoke", "evaluate"],
    "inference": ["inference", "preset_smoke"],
}


HANDLERS = {"RunRecorder": "train#handlers", "MultiTaskMetrics": "handlers", "FailureGallery": "handlers"}  # where they are


class Opened(ConfigWorkflow):
    """A workflow on the small phantom data, whose components are looked at and never run."""

    def __init__(self, workflow, phantom_dir, folder, entries):
        training = {"dataset_dir": str(phantom_dir), "cache_rate": 0.0}
        places = {"input": str(phantom_dir / "images")} if workflow == "inference" else training
        places |= {"output_dir": str(folder / "out"), "device": "cpu"}
        places |= {"checkpoint": str(folder / "undescribed.pt")} if workflow == "inference" else {}  # the knobs decide all
        files = [str(ROOT / f"configs/{name}.json") for name in FILES[workflow]]
        super().__init__(files, logging_file=False, **{**places, **entries})
        self.shipped = json.loads(Path(files[0]).read_text())

    def __getitem__(self, id):
        return self.parser.get_parsed_content(id)

    def handler(self, name, section=None):
        """The handler of a class in a list of handlers."""
        section = section or HANDLERS[name]
        targets = [handler["_target_"].split(".")[-1] for handler in self.parser[section]]
        return self[f"{section}#{targets.index(name)}"]

    def default(self, id):
        """What a knob is if it is not set."""
        self.parser[id] = self.shipped[id]
        return self[id]

    def arguments(self, function, id="run"):
        """What an expression of a list passes to a function."""
        (item,) = (index for index, text in enumerate(self.parser[id]) if f".{function}(" in text)
        expression = self.parser[f"{id}#{item}"]
        call = expression[expression.index(function) + len(function) :]
        self.parser["passed"] = f"$(lambda *values, **named: (*values, *named.values())){call}"
        passed = self["passed"]
        self.parser.config.pop("passed")
        return passed

    def head(self, task):
        return self["network"].heads[task]

    def outcome(self, id):
        """Line of the error that getting a component raises; None without an error."""
        try:
            self[id]
        except Exception as error:
            while error and not isinstance(error, UserError):
                error = error.__cause__
            assert error, f"{id}: expected no error but a UserError"
            return str(error)


def sizes(module):
    return [tuple(parameter.shape) for parameter in module.parameters()]


def of_transform(transforms, name):
    (found,) = (item for item in transforms.transforms if type(item).__name__ == name)
    return found


def names(holder):
    return [task.name for task in holder.tasks]


def of_task(holder, name):
    """The task of a name among the tasks of a component."""
    return holder.tasks[names(holder).index(name)]


def seed_after(w):
    (index,) = (i for i, text in enumerate(w.parser["initialize"]) if "set_determinism" in text)
    w[f"initialize#{index}"]
    return torch.initial_seed()


def stages(w):
    """Configurations of the stages of the curriculum, by name."""
    return curriculum._stage_configs(w, Path("out"), ROOT / "configs")


def kinds(transforms):
    return [type(item).__name__ for item in transforms.transforms]


def both(component):
    return {part: f"{part}#{component}" for part in ("train", "validate")}


def task(id, name, attribute):
    return lambda w: getattr(of_task(w[id], name), attribute)


def validated(name):
    return lambda w: of_task(w.handler("MultiTaskMetrics", "validate#handlers"), name).classes


def passed(function, position):
    return lambda w: w.arguments(function)[position]


def outcome(id):
    return lambda w: w.outcome(id)


def read(w, how):
    """The part of a workflow that a function reads, or "COMPONENT.ATTRIBUTE", whose component may be a handler or a head."""
    if callable(how):
        return how(w)
    name, attributes = how.split(".", 1)
    component = w.handler(name) if name in HANDLERS else w.head(name) if name in TASKS else w[name]
    return attrgetter(attributes)(component)


# Knob -> [value, {component: how `read` reads it} or that alone, other entries]; for an argument of a component, `knob::argument`.
TRAIN = {
    "bundle_root": ["elsewhere", {"output_dir": lambda w: w.default("output_dir")}],
    "dataset_dir": ["elsewhere", {"datalist": lambda w: w["datalist"], "records": outcome("records")}],
    "datalist": ["none.json", {"records": outcome("records"), "run": passed("open_run", 4)}],
    "output_dir": ["out", {"recorder": "RunRecorder.folder", "run": passed("open_run", 0)}],
    "classes": [
        ["a", "b"],
        {
            "records": outcome("records"),
            "head": lambda w: w.head("classification")[-1].out_features,
            "metrics": validated("classification"),
        },
    ],
    "segmentation_classes": [
        ["a", "b"],
        {
            "mask": lambda w: w["preprocessing"].transforms[0].segmentation_classes,
            "head": lambda w: sizes(w.head("segmentation").output),
            "metrics": validated("segmentation"),
        },
    ],
    "tasks": [
        {"segmentation": 0.5},
        {
            "heads": lambda w: list(w["network"].heads),
            "loss": lambda w: {task.name: task.weight for task in w["loss"].tasks},
            "sampler": lambda w: w["train#sampler"].weights.tolist(),
            "metrics": lambda w: names(w.handler("MultiTaskMetrics", "validate#handlers")),
        },
    ],
    "draws": [{"segmentation": 5.0}, {"sampler": lambda w: w["train#sampler"].weights.tolist()}],
    "leave_out": [
        ["phantom"],
        {split: lambda w, s=split: w.outcome(f"{s}#data") or len(w[f"{s}#data"]) for split in ("train", "validate")},
    ],
    "uncertainty_weights": [
        True,
        {"loss": lambda w: len(sizes(w["loss"])), "optimizer": lambda w: len(w["optimizer"].param_groups[0]["params"])},
    ],
    "segmentation_loss": ["dice", {"loss": lambda w: [*map(type, of_task(w["loss"], "segmentation").criterion.losses)]}],
    "label_smoothing": [0.3, {"loss": task("loss", "classification", "label_smoothing")}],
    "backbone": ["vgg13", {"encoder": lambda w: sizes(w["network"].encoder)}],
    "pretrained": ["none.pth", {"encoder": outcome("network")}],
    "decoder_channels": [[8, 8], {task: lambda w, t=task: sizes(w.head(t)) for task in ("segmentation", "reconstruction")}],
    "skips": [False, {"reconstruction": lambda w: sizes(w.head("reconstruction"))}],
    "dropout": [
        0.7,
        {"classification": lambda w: [m.p for m in w.head("classification").modules() if isinstance(m, nn.Dropout)]},
    ],
    "detection": [{"fpn_channels": 8}, {"head": lambda w: sizes(w.head("detection"))}],
    "detection::fpn_channels": [8, {"fpn": lambda w: sizes(w.head("detection").fpn)}],
    "detection::box_features": [8, {"box head": lambda w: sizes(w.head("detection").roi_heads.box_head)}],
    "detection::mask_channels": [[8, 8], {"mask head": lambda w: sizes(w.head("detection").roi_heads.mask_head)}],
    "detection::anchor_sizes": [[[5], [6], [7], [8]], "detection.rpn.anchor_generator.sizes"],
    "detection::aspect_ratios": [[1.5], "detection.rpn.anchor_generator.aspect_ratios"],
    "detection::score_threshold": [0.2, "detection.roi_heads.score_thresh"],
    "detection::nms_threshold": [0.7, "detection.roi_heads.nms_thresh"],
    "detection::detections_per_image": [3, "detection.roi_heads.detections_per_img"],
    "image_size": [
        96,
        {
            "train": lambda w: w["train#dataset"][0]["image"].shape,
            "validate": lambda w: w["validate#dataset"][0]["image"].shape,
            "shifts": lambda w: of_transform(w["augmentation"], "RandAffined").rand_affine.rand_affine_grid.translate_range,
        },
    ],
    "window": [[-200, 100], {"preprocessing": lambda w: of_transform(w["preprocessing"], "ScaleIntensityd").window}],
    "cropping": ["lungs", {"model": lambda w: w["model"]["cropping"]}],
    "max_epochs": [7, {"trainer": "train#trainer.state.max_epochs", "schedule": "lr_scheduler.t_total"}],
    "batch_size": [3, both("dataloader.batch_size")],
    "epoch_size": [2, {"draws": "train#sampler.num_samples", "drop_last": "train#dataloader.drop_last"}],
    "learning_rate": [0.5, {"optimizer": lambda w: w["optimizer"].param_groups[0]["lr"]}],
    "weight_decay": [0.5, {"optimizer": lambda w: w["optimizer"].param_groups[0]["weight_decay"]}],
    "warmup_epochs": [4, "lr_scheduler.warmup_steps"],
    "init_checkpoint": [
        "w.pt",
        {"check": passed("check_annotated", 2), "run": passed("open_run", 3), "recorder": "RunRecorder.init_checkpoint"},
    ],
    "transfer": [False, {"curriculum": lambda w: [c["init_checkpoint"] for c in stages(w).values()]}],
    "resume": [
        False,
        {
            "run": passed("open_run", 2),
            "recorder": "RunRecorder.resume",
            "curriculum": lambda w: [config["resume"] for config in stages(w).values()],
        },
    ],
    "amp": [True, {"train": "train#trainer.amp", "validate": "validate#evaluator.amp"}],
    "num_workers": [1, both("dataloader.num_workers")],
    "cache_rate": [1.0, both("dataset.cache_num")],
    "ema_momentum": [
        0.5,
        {
            "average": lambda w: w["ema"] and w["ema"].momentum,
            "evaluator": lambda w: w["validate#evaluator"].network is w["network"],
            "recorder": lambda w: w.handler("RunRecorder").ema is None,
        },
    ],
    "frozen_encoder": [True, {"encoder": lambda w: any(p.requires_grad for p in w["network"].encoder.parameters())}],
    "lungs_at_random": [0.5, {"augmentation": lambda w: kinds(w["augmentation"])}],
    "denoising": [True, {"corruption": lambda w: kinds(w["corruption"])}],
    "seed": [5, {"start": seed_after, "epochs": "RunRecorder.seed"}],
    "device": [
        "meta",
        {
            "network": lambda w: next(w["network"].parameters()).device,
            "trainer": "train#trainer.state.device",
            "evaluator": "validate#evaluator.state.device",
        },
    ],
    "val_interval": [4, "RunRecorder.val_interval"],
    "stages": [{"stage_joint": {"seed": 3}}, {"curriculum": lambda w: {name: c["seed"] for name, c in stages(w).items()}}],
}
EVALUATE = {
    "pretrained": ["none.pth", {"encoder": outcome("network")}],
    "split": ["training", {"data": lambda w: [record["image"] for record in w["data"]]}],
    "bootstrap": [3, "MultiTaskMetrics.bootstrap"],
    "checkpoint": ["w.pt", {"run": lambda w: w.arguments("load_weights", "load")[1]}],
    "tasks": [["detection"], {"metrics": lambda w: names(w.handler("MultiTaskMetrics"))}],
    "regions": ["lung", {"data": lambda w: kinds(w["dataset"].transform), "metrics": "MultiTaskMetrics.folder"}],
    "failures": [True, {"gallery": lambda w: w.handler("FailureGallery") is None}],
    "with_images": [False, {"gallery": lambda w: w.handler("FailureGallery").with_images}, {"failures": True}],
    "evaluation_dir": ["there", "MultiTaskMetrics.folder"],
    "dataset_dir": ["elsewhere", {"data": outcome("data")}],
    "leave_out": [["phantom"], {"data": lambda w: w.outcome("data") or len(w["data"])}, {"split": "training"}],
    "output_dir": ["out", {"checkpoint": lambda w: w["checkpoint"], "metrics": "MultiTaskMetrics.folder"}],
    "batch_size": [3, "dataloader.batch_size"],
    "num_workers": [1, "dataloader.num_workers"],
    "seed": [5, "MultiTaskMetrics.seed"],
    "amp": [True, "evaluator.amp"],
    "device": ["meta", "evaluator.state.device"],
}
INFERENCE = {
    "bundle_root": ["elsewhere", {"output_dir": lambda w: w.default("output_dir")}],
    "dataset_dir": ["elsewhere", {"input": lambda w: w.default("input")}, {"dataset_dir": "here"}],
    "input": ["none.png", {"worklist": outcome("worklist")}],
    "output_dir": ["out", "worklist.folder"],
    "checkpoint": [
        "w.pt",
        {
            "run": lambda w: w.arguments("load_weights", "load")[1],
            "reference": lambda w: w["reference"],
            "stamp": "predictor.fingerprint",
        },
    ],
    "reference": ["none.pt", {"predictor": outcome("predictor")}],
    "classes": [
        ["a", "b"],
        {
            "head": lambda w: w.head("classification")[-1].out_features,
            "predictor": task("predictor", "classification", "classes"),
        },
    ],
    "segmentation_classes": [
        ["a", "b"],
        {"head": lambda w: sizes(w.head("segmentation").output), "predictor": task("predictor", "segmentation", "classes")},
    ],
    "tasks": [["segmentation"], {"heads": lambda w: list(w["network"].heads), "predictor": lambda w: names(w["predictor"])}],
    **{knob: TRAIN[knob] for knob in ("backbone", "decoder_channels", "skips", "window", "cropping")},
    **{knob: case for knob, case in TRAIN.items() if knob.startswith("detection")},
    "image_size": [96, {"dataset": lambda w: w["dataset"][0]["image"].shape}],
    "score_threshold": [0.9, {"boxes": task("postprocessing", "detection", "score_threshold")}],
    "link_iou": [0.9, {"predictor": task("predictor", "detection", "link_iou")}],
    "flips": [False, {"inferer": lambda w: type(w["inferer"])}],
    "backend": ["onnxruntime", {"network": lambda w: type(w["network"])}],
    "keep_identifiers": [True, "predictor.keep_identifiers"],
    "save_reconstruction": [True, {"predictor": task("predictor", "reconstruction", "dense")}],
    "export_task": ["classification", {"network_def": lambda w: list(w["network_def"].heads)}],
    "batch_size": [3, "dataloader.batch_size"],
    "num_workers": [1, "dataloader.num_workers"],
    "amp": [True, "evaluator.amp"],
    "device": ["meta", {"network": lambda w: next(w["network"].parameters()).device, "evaluator": "evaluator.state.device"}],
}
CASES = {"train": TRAIN, "evaluate": EVALUATE, "inference": INFERENCE}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_knob_has_a_case(workflow):
    """Those that a config file itself refers to; evaluate.json lies over train.json."""
    text = (ROOT / f"configs/{workflow}.json").read_text()
    own = knobs(workflow)
    expected = {knob for knob in own if knob in json.loads(text) or re.search(rf"@{knob}\b", text)}
    expected |= {f"{knob}::{part}" for knob in expected for part in knobs("train").get(knob, {}).get("properties", ())}
    assert CASES[workflow].keys() == expected


@pytest.mark.parametrize(("workflow", "knob"), [(workflow, knob) for workflow in WORKFLOWS for knob in CASES[workflow]])
def test_changing_a_knob_changes_its_components(workflow, knob, phantom_dir, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where relative paths among the values lead
    for path in (tmp_path / "w.pt", tmp_path / "out/model.pt"):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(checkpoint)
    weights = torch.load(checkpoint, weights_only=True)
    torch.save({name: weights[name] for name in weights if name != "_extra_state"}, tmp_path / "undescribed.pt")
    value, components, *others = CASES[workflow][knob]
    usual = {id: entry for entries in others for id, entry in entries.items()}
    usual, changed = (Opened(workflow, phantom_dir, tmp_path, entries) for entries in (usual, {**usual, knob: value}))
    for name, how in components.items() if isinstance(components, dict) else [(components, components)]:
        before, after = read(usual, how), read(changed, how)
        assert before != after, f"{workflow}: {knob} {value!r} leaves {name} as it is, {before!r}"
