"""pyvidx.eval.mteb: the same embeddings as by hand, whatever the loader hands over; and mteb's own run where it is."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from pyvidx.backbones.text import TextTower
from pyvidx.data import motion
from pyvidx.eval.mteb import Encoder, encoder
from pyvidx.models import TextVideo, VideoEncoder
from pyvidx.preprocess import clip_preprocess

SCENES = motion.random_scenes(4, seed=3)


@pytest.fixture(scope="module")
def ours():
    return encoder()


def rows(*names: str, lengths=(16, 9, 16, 3)) -> list[dict]:
    values = {
        "id": [str(i) for i in range(4)],
        "text": [motion.caption(s) for s in SCENES],
        "video": [motion.render(s, n, (40, 56)).movedim(-1, 1) for s, n in zip(SCENES, lengths)],
    }
    return [{name: values[name][i] for name in ("id", *names)} for i in range(4)]


@torch.inference_mode()
def test_videos_and_texts_are_those_of_the_model(ours):
    found = ours.encode(DataLoader(rows("video", lengths=(16,) * 4), batch_size=3))
    pair = TextVideo.default()
    T, size = pair.about["frames"], pair.model.tower.config.image_size
    index = [round((15 / T) * i) + int(15 / T / 2) for i in range(T)]  # "uniform"
    pixels = torch.stack([clip_preprocess(motion.render(s, 16, (40, 56))[index], size) for s in SCENES])
    by_hand = torch.nn.functional.normalize(pair.model(pixels, outputs=["pooled"]).pooled, dim=-1)
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=0)
    texts = ours.encode(DataLoader(rows("text"), batch_size=3))
    cosines = ours.similarity(texts, found)
    by_hand = pair.similarity(by_hand, [motion.caption(s) for s in SCENES]).T
    torch.testing.assert_close(cosines, by_hand, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.similarity_pairwise(texts, found), cosines.diagonal(), atol=1e-6, rtol=0)
    arrays = [row | {"video": row["video"].numpy()} for row in rows("video", lengths=(16,) * 4)]
    loader = DataLoader(arrays, batch_size=4, collate_fn=list)
    torch.testing.assert_close(ours.encode(loader), found, atol=1e-5, rtol=0)
    assert loader.collate_fn is list
    both = ours.encode(DataLoader(rows("text", "video", lengths=(16,) * 4), batch_size=4))
    torch.testing.assert_close(both, torch.nn.functional.normalize(texts + found, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["midpoint", "random_interval"])
def test_a_batch_changes_nothing(sampler):
    """Rules that give fewer frames of a short video, and rules that draw."""
    model = VideoEncoder.default("mean")
    one = Encoder(model, name="pyvidx/mean", sampler=sampler)
    alone, together = (one.encode(DataLoader(rows("video"), batch_size=n)) for n in (1, 4))
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_what_does_not_fit(ours):
    videos = Encoder(ours.model, name="pyvidx/videos")
    for loader, said in ((rows("text"), "needs a text tower"), (rows(), "must have a text or a video")):
        with pytest.raises(ValueError, match=said):
            videos.encode(DataLoader(loader, batch_size=2))
    for loader in ([rows("video")[0], rows("text")[0]], [rows("text")[0], {"text": None}]):
        with pytest.raises(ValueError, match="all rows of a batch must have a"):
            ours.encode(DataLoader(loader, batch_size=2))
    with pytest.raises(ValueError, match="0"):
        encoder(frames=0)
    with pytest.raises(ValueError, match="given together"):
        Encoder(ours.model, ours.text, name="pyvidx/x")
    with pytest.raises(ValueError, match="share one space"):
        Encoder(ours.model, TextTower(replace(ours.text.config, embed_dim=48)), ours.tokens, name="pyvidx/x")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        encoder(text="towers", name="pyvidx/x")


def test_mteb_ranks_a_made_up_task(ours, tmp_path, monkeypatch):
    """Run with mteb 2.26.24, datasets 5.2.0 and torchcodec 0.13.0."""
    mteb = pytest.importorskip("mteb", reason="needs mteb")
    pytest.importorskip("torchcodec", reason="mteb decodes by torchcodec")
    from datasets import Dataset, Video
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    for i, scene in enumerate(SCENES):
        motion.write_clip(tmp_path / f"{i}.mp4", scene, frames=16, size=64)
    nothing = dict.fromkeys(
        ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect",
         "sample_creation", "bibtex_citation")
    )  # fmt: skip

    class Motion(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="PyvidxMotion", description="made up", dataset={"path": "no/where", "revision": "1"},
            type="Any2AnyRetrieval", category="t2v", eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="ndcg_at_10", modalities=["text", "video"], **nothing,
        )  # fmt: skip

        def load_data(self, num_proc=None, **_):
            ids = [str(i) for i in range(4)]
            texts = Dataset.from_dict({"id": ids, "text": [motion.caption(s) for s in SCENES]})
            videos = Dataset.from_dict({"id": ids, "video": [str(tmp_path / f"{i}.mp4") for i in ids]})
            one = RetrievalSplitData(
                queries=texts, corpus=videos.cast_column("video", Video()),
                relevant_docs={i: {i: 1} for i in ids}, top_ranked=None,
            )  # fmt: skip
            self.dataset, self.data_loaded = {"default": {"test": one}}, True

    assert isinstance(ours, mteb.models.models_protocols.EncoderProtocol)
    result = mteb.evaluate(ours, Motion(), cache=None, co2_tracker=False, encode_kwargs={"batch_size": 3})
    scores = result.task_results[0].scores["test"][0]
    assert scores["recall_at_1"] == 1.0  # the model that ships knows these scenes
    assert ours.mteb_model_meta.revision != encoder(module="mean").mteb_model_meta.revision
