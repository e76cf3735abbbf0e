"""pyvidx eval: numbers of a benchmark from videos, embeddings, answers or a judge's replies."""

import argparse
import sys
from collections.abc import Sequence

from pyvidx import eval as tasks
from pyvidx.cli.eval_arguments import check, parser
from pyvidx.data.tables import FIELD, read_text
from pyvidx.eval import annotations, judge, lvu, report
from pyvidx.eval.annotations import classes
from pyvidx.eval.files import digest, read_tensors
from pyvidx.eval.predict import predict, read_predictions
from pyvidx.eval.retrieval import retrieval
from pyvidx.files import printable


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    check(p, options)
    run = {
        "retrieval": run_retrieval, "classify": run_classify, "answers": run_answers, "aspects": run_aspects,
        "lvu": run_lvu, "anticipation": run_anticipation, "judge": run_judge, "rows": run_rows, "predict": run_predict,
    }[options.command]  # fmt: skip
    try:
        result, about = run(options)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except RuntimeError as error:
        for name, why in getattr(error, "broken", {}).items():
            print(f"FAILED {printable(name)}: {printable(why)}", file=sys.stderr)
        print(printable(str(error)), file=sys.stderr)
        return 1
    if result:
        print(report.text(result))
    for name, value in about.items():
        if value:
            shown = f"{len(value)}: {', '.join(list(value)[:5])}" if isinstance(value, dict) else value
            print(printable(f"{name}: {shown}"))
    if result and options.json:
        report.write_json(options.json, result, about)
        print(f"wrote {options.json}")
    if result and options.plot:
        report.plot(options.plot, result, title=getattr(options, "task", None) or options.command)
        print(f"wrote {options.plot}")
    return 0


def run_retrieval(options: argparse.Namespace):
    changes = {"ties": options.ties, "dsl": options.dsl or None, "compat": options.compat, "broken": options.broken}
    changes = {name: value for name, value in changes.items() if value is not None}
    if options.config is not None:
        from pyvidx.eval import zero_shot

        return zero_shot.run_retrieval(zero_shot.Config.from_file(options.config, **changes))
    from torch.nn.functional import normalize

    arrays = read_tensors(options.embeddings, {"text": 2, "video": 2}, {"captions": 1})
    if arrays["text"].shape[1] != arrays["video"].shape[1]:
        shapes = ", ".join(f"{name} {tuple(arrays[name].shape)}" for name in ("text", "video"))
        raise ValueError(f"eval: {options.embeddings} must hold text [n, E] and video [m, E], got {shapes}")
    similarity = normalize(arrays["text"].float(), dim=1) @ normalize(arrays["video"].float(), dim=1).T
    captions = arrays["captions"].tolist() if "captions" in arrays else None
    return retrieval(similarity, captions, **changes), {}


def run_classify(options: argparse.Namespace):
    from pyvidx.eval import zero_shot

    changes = {} if options.broken is None else {"broken": options.broken}
    return zero_shot.run_classification(zero_shot.Config.from_file(options.config, **changes))


def run_predict(options: argparse.Namespace):
    from dataclasses import replace

    import torch

    from pyvidx.cli.encode import progress
    from pyvidx.train import malmm, recipe

    task, samples = tasks.task(options.task), parsed(options)
    task = replace(task, frames=options.frames or task.frames, memory=options.memory or task.memory)
    config = malmm.Config.from_dict(recipe.load(options.config, "eval"))
    config = replace(config, frames=task.frames, **({"weights": str(options.weights)} if options.weights else {}))
    asked = malmm.build(config, torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    broken = predict(
        samples, task, asked.model.eval(), asked.language, options.out, root=options.root or config.root,
        reader=config.reader, memory=asked.memory, name=str(config.weights),
        shown=lambda todo: progress(todo, len(todo)),
    )  # fmt: skip
    about = {"samples": len(samples), "frames": task.frames, "memory": task.memory, "wrote": str(options.out)}
    if asked.model.is_random:
        about["random weights"] = True
    if task.ours:
        about["chosen by pyvidx, as nothing public says it"] = ", ".join(task.ours)
    return {}, about | {"without an answer": broken}


def run_answers(options: argparse.Namespace):
    task = tasks.task(options.task)
    predicted, about = read_predictions(options.predictions), {}
    if options.format is None:
        if len(options.annotations) != 1:
            raise ValueError("eval: several annotation files need a --format")
        wanted = annotations.sample.load(options.annotations[0], dict)
    else:
        samples = parsed(options)
        wanted = annotations.truth(samples)
        about["labels"] = len(annotations.labels(samples)) if task.metric == "exact" else None
        if options.reference:
            missing = annotations.absent(samples, annotations.parse("official_qa", options.reference))
            about["questions missing from the annotations"] = {s.id: s.video for s in missing}
            about["videos of those"] = len({s.video for s in missing}) or None
    result = {options.task: task.score(predicted, wanted, compat=options.compat)}
    if options.format == "lvu":
        first = [p if isinstance(p, str) else p[0] for p in (predicted[s.id] for s in samples)]
        result = {f"{options.task}, every window": result[options.task]}
        vote = lvu.vote_texts(first, [s.video for s in samples], [s.answer for s in samples])
        result[f"{options.task}, vote of each video"] = {"top-1": vote}
    return result, about


def run_lvu(options: argparse.Namespace):
    samples = annotations.parse("lvu_official", options.annotations, task=options.task)
    dim = 1 if options.task in classes.LVU_REGRESSIONS else 2
    arrays = read_tensors(options.scores, {"video": 1, "scores": dim})
    rows = arrays["video"].tolist()
    if set(rows) != set(range(len(samples))):
        raise ValueError(f"eval: {options.scores} must hold clips of all {len(samples)} videos, got {len(set(rows))}")
    if options.task in classes.LVU_REGRESSIONS:
        error = lvu.regression_error(arrays["scores"], rows, [samples[i].extra["target"] for i in rows])
        return {options.task: {"mean square error": error}}, {"videos": len(samples), "clips": len(rows)}
    wanted = [samples[i].extra["label"] for i in rows]
    each = 100 * sum(int(a == b) for a, b in zip(arrays["scores"].argmax(1).tolist(), wanted)) / len(rows)
    result = {"every clip": {"top-1": each}, "each video": {"top-1": lvu.vote(arrays["scores"], rows, wanted)}}
    return result, {"videos": len(samples), "clips": len(rows)}


def run_anticipation(options: argparse.Namespace):
    from pyvidx.eval import anticipated_texts as words
    from pyvidx.eval import anticipation

    samples = annotations.parse("epic_kitchens", options.segments)
    ids, action, about = [s.id for s in samples], None, {"segments": len(samples)}
    if options.scores is not None:
        arrays = read_tensors(options.scores, {"verb": 2, "noun": 2})
        verb, noun = arrays["verb"].float(), arrays["noun"].float()
    else:
        predicted = read_predictions(options.predictions)
        if lacking := [key for key in ids if key not in predicted]:
            raise ValueError(f"eval: {options.predictions} lacks {len(lacking)} segments, e.g. {lacking[:3]}")
        texts = [[x] if isinstance(x, str) else x for x in (predicted[key] for key in ids)]
        ranked = words.rank_texts(texts, words.read_classes(options.verbs), words.read_classes(options.nouns))
        about["segments without an action that is a class"] = int((ranked.action[:, 0] < 0).sum())
        about["chosen by pyvidx, as nothing public says it"] = "the ranking of texts; see the task's `ours`"
        verb, noun, action = words.scores(ranked)
    result = {}
    if all("verb_class" in s.extra for s in samples):
        lists = {
            "unseen": words.read_ids(options.unseen, "participant_id") if options.unseen else [],
            "tail_verbs": [int(x) for x in words.read_ids(options.tail_verbs, "verb")] if options.tail_verbs else [],
            "tail_nouns": [int(x) for x in words.read_ids(options.tail_nouns, "noun")] if options.tail_nouns else [],
        }
        segments = anticipation.read_segments(options.segments)
        if options.scores is not None:
            result = anticipation.evaluate(verb, noun, segments, **lists)
        else:
            result = anticipation.evaluate_ranked(ranked, segments, **lists)
        # A recall without segments, as no list of them was given, is NaN, which is no JSON.
        result = {row: {k: v for k, v in found.items() if v == v} for row, found in result.items()}
    elif options.submission is None:
        raise ValueError(f"eval: {options.segments} has no classes to compare with; give --submission to write a file")
    if options.submission is not None:
        levels = dict(zip(("sls_pt", "sls_tl", "sls_td"), options.levels))
        about["submission"] = str(
            anticipation.write_submission(options.submission, ids, verb, noun, action, supervision=levels)
        )
    return result, about


def run_judge(options: argparse.Namespace):
    verdict = options.protocol == "qa"
    if options.url is not None:
        key = read_text(options.key_file, FIELD).strip() if options.key_file else None
        by, name = judge.ChatJudge(options.url, options.model, key=key), options.model
    else:
        by, name = judge.replay(options.replay), f"replay of {digest(read_text(options.replay))}"
    asked = judge.predictions(options.predictions)
    pause = 0.0 if options.replay else 1.0
    replies = judge.run(
        asked, judge.Prompt.from_file(options.prompt), by, options.job, verdict=verdict, compat=options.compat,
        attempts=1 if options.replay else options.attempts, pause=pause, name=name,
    )  # fmt: skip
    if replies.failed and not options.partial:
        key, why = next(iter(replies.failed.items()))
        raise RuntimeError(f"eval: {len(replies.failed)} of {len(asked)} have no reply that reads, e.g. {key}: {why}; "
                           "the same command asks them again, --partial leaves them out")  # fmt: skip
    result = judge.judged(list(replies.found.values()), verdict=verdict, compat=options.compat)
    about = {"judge": name, "items": len(asked), "left out": replies.failed, "compat": options.compat}
    return {options.protocol: result}, about


def run_aspects(options: argparse.Namespace):
    files = {name: getattr(options, name) for name in judge.ASPECTS}
    replies = {name: judge.recorded(path, verdict=False, compat=options.compat) for name, path in files.items()}
    about = {"items": " ".join(f"{name} {len(found)}" for name, found in replies.items()), "compat": options.compat}
    found = judge.aspects({name: list(r.values()) for name, r in replies.items()}, compat=options.compat)
    return {"score": found}, about


def run_rows(options: argparse.Namespace):
    samples = parsed(options)
    annotations.write_rows(options.out, samples, tasks.task(options.task).ask, suffix=options.suffix)
    return {}, {"samples": len(samples), "wrote": str(options.out)}


def parsed(options: argparse.Namespace) -> list[annotations.Sample]:
    """The samples of --annotations; LVU's formats take the task from --task."""
    given = dict(options.option)
    if options.format in ("lvu", "lvu_official") and options.task.startswith("lvu_"):
        given.setdefault("task", options.task.removeprefix("lvu_"))
    return annotations.parse(options.format, options.annotations, **given)
