"""Checkpoints and recordings as others write them: the right numbers, or one sentence."""

import hashlib
import json
import shutil
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import zarr
from flax.training import train_state

import esljax as esl

MEMBERS, TIMES = (0, 1), (100, 200)
SHAPES = {"layer.bias": (3,), "layer.weight": (2, 3)}
ROW = sorted(SHAPES)


def weights(member, time):
    random = np.random.default_rng([member, time])
    return {key: random.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()}


POSITIONS = np.array(
    [[np.concatenate([weights(i, t)[k].ravel() for k in ROW]) for i in MEMBERS] for t in TIMES]
)


def write(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        plain = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        safetensors.numpy.save_file(plain, path)


def save(folder, make=weights, name="step_{}.npz"):
    """A folder of checkpoints; `name` has a slash where a checkpoint is a folder."""
    for member in MEMBERS:
        for time in TIMES:
            write(folder / f"member_{member}" / name.format(time), make(member, time))
    return folder


def beside(name, shape=(2, 3), dtype=np.float32):
    """Weights, and one array more."""

    def make(member, time):
        more = np.random.default_rng([9, member, time]).normal(size=shape) * 100
        return {**weights(member, time), name: more.astype(dtype)}

    return make


# What is no parameter


KNOWN = {
    "state of an optimizer": [
        "exp_avg",
        "optimizer.state.0.exp_avg_sq",
        "opt_state/0/mu/layer/weight",
        "momentum.layer.weight",
        "layer.weight/Adam_1",
        "layer.weightMomentumBuffer",
        "optimizer_G/slots",
    ],
    "running statistics": [
        "bn.running_var",
        "batch_stats/bn/mean",
        "bn/moving_variance",
        "bnRunningMean",
    ],
    "averaged copies": [
        "ema.layer.weight",
        "module.ema.layer.weight",
        "layer.weight_ema",
        "swa_model.layer.weight",
        "layer.weight/ExponentialMovingAverage",
    ],
    "state of the training": ["lr_scheduler.base_lrs"],
    "random streams": ["rng_state", "dropout.rngs.key"],
}


@pytest.mark.parametrize(
    ("name", "reason"), [(name, reason) for reason, names in KNOWN.items() for name in names]
)
def test_known_companions_are_left_out(name, reason, tmp_path):
    suffix = ".npz" if "/" in name else ".safetensors"
    recording = esl.recordings.read(save(tmp_path, beside(name), f"step_{{}}{suffix}"))
    np.testing.assert_array_equal(recording.positions, POSITIONS)
    assert recording.left_out == {name: reason}
    assert dict(recording.keys) == SHAPES
    assert list(recording.keys) == ROW


@pytest.mark.parametrize(
    "name", ["step", "global_step", "bn.num_batches_tracked", "opt.count", "scheduler.last_epoch"]
)
def test_counters_do_not_block(name, tmp_path):
    recording = esl.recordings.read(save(tmp_path, beside(name, (), np.int64)))
    np.testing.assert_array_equal(recording.positions, POSITIONS)
    assert set(recording.left_out) == {name}


@pytest.mark.parametrize(
    "name",
    [
        "m",
        "v.layer.weight",
        "layer.weight_m",
        "velocity",
        "trace.layer.weight",
        "mu.layer.weight",
        "bn.mean",
        "target.layer.weight",
        "best.layer.weight",
        "avg_layer.weight",
        "weight_average",
    ],
)
def test_what_cannot_be_told_apart_is_refused_and_chosen(name, tmp_path, refused):
    save(tmp_path, beside(name))
    refused(
        lambda: esl.recordings.read(tmp_path),
        rf"tell apart .* skip='{name}'\), but `{name}` of .*member_0/step_100.npz may be ",
    )
    skipped = esl.recordings.read(tmp_path, skip=name)
    np.testing.assert_array_equal(skipped.positions, POSITIONS)
    assert skipped.left_out == {name: "chosen by skip"}
    taken = esl.recordings.read(tmp_path, only="*")
    assert set(taken.keys) == {*SHAPES, name}
    assert taken.positions.shape == (2, 2, 15)


@pytest.mark.parametrize(
    "names",
    [
        ["attention.q", "attention.k", "attention.v"],
        ["mu.weight", "logvar.weight"],
        ["conv.weight_g", "conv.weight_v"],
        ["source_embedding.weight", "target_embedding.weight"],
        ["optimal.weight", "schema.weight", "running.weight", "adaptive.weight"],
        ["layers_0.weight", "layers_1.weight", "logit_scale", "temperature"],
    ],
)
def test_parameters_stay(names, tmp_path):
    def make(member, time):
        return {name: np.full((2, 2), member + time, "f4") for name in names}

    recording = esl.recordings.read(save(tmp_path, make))
    assert set(recording.keys) == set(names)
    assert not recording.left_out


def test_moments_beside_their_parameters_are_left_out(tmp_path):
    def moments(member, time):
        return {
            **weights(member, time),
            "0.count": np.array(time),
            **{f"0.{name}.{key}": np.ones(SHAPES[key]) for name in ("mu", "nu") for key in SHAPES},
            "bn.mean": np.ones(3),
            "bn.var": np.ones(3),
        }

    recording = esl.recordings.read(save(tmp_path, moments))
    np.testing.assert_array_equal(recording.positions, POSITIONS)
    assert recording.left_out["0.mu.layer.bias"] == "state of an optimizer"
    assert recording.left_out["bn.mean"] == "running statistics"


def test_only_and_skip_match_whole_keys_with_case(tmp_path, refused):
    def make(member, time):
        return {**weights(member, time), "ema.layer.bias": np.ones(3, "f4")}

    save(tmp_path, make)

    def only(*patterns, **more):
        return list(esl.recordings.read(tmp_path, only=patterns, **more).keys)

    assert only("layer/*") == ROW
    assert only("layer.bias", "*.weight") == ROW
    assert only("*bias") == ["layer.bias"], "a copy is not what a wide pattern asks for"
    assert only("ema.*") == ["ema.layer.bias"], "a narrow one does"
    assert only("*", skip=["*.weight"]) == ["layer.bias"]
    for argument in ("only", "skip"):
        for pattern in ("Layer.*", "layer", "layr.bias"):
            refused(
                lambda argument=argument, pattern=pattern: esl.recordings.read(
                    tmp_path, **{argument: pattern}
                ),
                f"`{argument}` must match keys of .*nearest are .*`layer.bias`.*, but '{pattern}' "
                "matches none",
            )
    refused(lambda: esl.recordings.read(tmp_path, skip="*"), "holds none besides what is left out")
    refused(lambda: esl.recordings.read(tmp_path, skip=""), "`skip` must hold patterns of keys")


# Numbers in names


@pytest.mark.parametrize(
    ("names", "times"),
    [
        (["step_-1", "step_0"], [-1, 0]),
        (["step_1e3", "step_500"], [500, 1000]),
        (["step_.5", "step_0.25"], [0.25, 0.5]),
        (["step_100_fp16", "step_200_fp16"], [100, 200]),
        (["v2_step_1-bf16", "v2_step_2-bf16"], [1, 2]),
        (["step_000100_of_5", "step_000200_of_5"], [100, 200]),
        (["epoch=3-step=100", "epoch=4-step=200"], [100, 200]),
        (["step_1_loss_0.9", "step_2_loss_0.8"], [1, 2]),
        (["epoch=1-step=5", "epoch=1-step=9", "epoch=2-step=1"], "numbers agree on the order"),
        (["checkpoint-500", "checkpoint-1000"], [500, 1000]),
        (["step_1", "step_2", "last"], [1, 2]),
        (["step_1", "best_0.93"], "name='step_{}', or move .* best_0.93.npz and 1 more in "),
        (["step_1", "step_2_fp16"], "names that agree in all but one number"),
        (["t-1", "t0"], "names that agree in all but one number"),
        (["t-1", "t-2"], "whose sign is clear .*'t-{}' for a hyphen, or 't{}' for a minus"),
        (["3_17", "4_25"], r"differ in one number \(choose one by name='{}_\*' or '\*_{}'\)"),
        (["step_1e999", "step_2"], "finite numbers in its names"),
        (["ema_1", "ema_2", "step_1", "step_2"], "name='step_{}'"),
        (["step-1,000", "step-2,500"], "name='step-{},.*but step-1,000.npz has ',' between"),
        (["t_0,5", "t_1,25"], "stand together .* but t_0,5.npz has ','"),
        (["step_1_000", "step_12_500"], "choose the first alone by name='step_{}_.*has '_' bet"),
        (["step_5_0.93", "step_6_0.91"], [5, 6]),
        (["step_100_of_250", "step_200_of_251"], [100, 200]),
    ],
    ids=str,
)
def test_times_are_what_names_mean(names, times, tmp_path, refused):
    for member in ("seed_0", "seed_1"):
        for name in names:
            write(tmp_path / member / f"{name}.npz", {"w": np.ones(2, np.float32)})
    if isinstance(times, str):
        refused(lambda: esl.recordings.read(tmp_path), times)
    else:
        np.testing.assert_array_equal(esl.recordings.read(tmp_path).times, times)


def test_a_pattern_chooses_names(tmp_path, refused):
    save(tmp_path)
    for member in MEMBERS:
        write(tmp_path / f"member_{member}" / "best_0.93.npz", {"other": np.ones(2)})
        (tmp_path / f"member_{member}" / "optimizer_3.pt").write_bytes(b"no matter")
    read = esl.recordings.read
    np.testing.assert_array_equal(read(tmp_path, name="step_{}").positions, POSITIONS)
    np.testing.assert_array_equal(read(tmp_path, name="*p_{}.npz").times, TIMES)
    shutil.copytree(tmp_path / "member_1", tmp_path / "old_2")
    refused(lambda: read(tmp_path, name="step_{}"), "name='member_{}/', .* but old_2 in ")
    both = read(tmp_path, name="member_{}/step_{}")
    np.testing.assert_array_equal(both.positions, POSITIONS)
    refused(lambda: read(tmp_path, name="member_{}/run_{}"), "'run_{}' matches none of best_0.93")
    for wrong in ("step", "", "{}{}", "a_{}/b_{}/c_{}"):
        refused(lambda wrong=wrong: read(tmp_path, name=wrong), "`name` must hold {} once")


# Layouts


def test_folders_of_hugging_face(tmp_path, refused):
    save(tmp_path / "one", name="checkpoint-{}/model.safetensors")
    for member in MEMBERS:
        for time in TIMES:
            folder = tmp_path / "one" / f"member_{member}" / f"checkpoint-{time}"
            (folder / "optimizer.pt").write_bytes(b"a pickle")
            (folder / "trainer_state.json").write_text("{}")
        write(tmp_path / "one" / f"member_{member}" / "model.safetensors", weights(0, 0))
    recording = esl.recordings.read(tmp_path / "one")
    np.testing.assert_array_equal(recording.positions, POSITIONS)
    assert recording.left_out == {"optimizer.pt": "a file of another format"}
    shard = "checkpoint-{}/model-0000%d-of-00002.safetensors"
    for number, key in enumerate(ROW, start=1):

        def pick(member, time, key=key):
            return {key: weights(member, time)[key]}

        save(tmp_path / "two", pick, shard % number)
    np.testing.assert_array_equal(esl.recordings.read(tmp_path / "two").positions, POSITIONS)
    content = {key: f"model-0000{number}-of-00002.safetensors" for number, key in enumerate(ROW, 1)}
    last = tmp_path / "two" / "member_1" / "checkpoint-200"
    index = last / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": content}))
    np.testing.assert_array_equal(esl.recordings.read(tmp_path / "two").positions, POSITIONS)
    index.write_text(json.dumps({"weight_map": {**content, "head": content[ROW[0]]}}))
    refused(lambda: esl.recordings.read(tmp_path / "two"), "`head` is in one alone of ")
    index.write_text(json.dumps({"weight_map": {**content, "head": "../../elsewhere"}}))
    refused(lambda: esl.recordings.read(tmp_path / "two"), "lacks '../../elsewhere'")
    (last / content[ROW[1]]).unlink()
    index.write_text(json.dumps({"weight_map": content}))
    refused(lambda: esl.recordings.read(tmp_path / "two"), "hold every shard, but .*00002-of-00002")
    index.unlink()
    refused(lambda: esl.recordings.read(tmp_path / "two"), "hold every shard, model-00001 to 00002")


def test_files_beside_an_index_are_said(tmp_path):
    save(tmp_path, name="checkpoint-{}/model-00001-of-00001.safetensors")
    save(tmp_path, name="checkpoint-{}/adapter.safetensors")
    for folder in tmp_path.glob("*/checkpoint-*"):
        owners = dict.fromkeys(ROW, "model-00001-of-00001.safetensors")
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": owners}))
    recording = esl.recordings.read(tmp_path)
    np.testing.assert_array_equal(recording.positions, POSITIONS)
    assert recording.left_out == {
        "adapter.safetensors": "a file that the index of the shards lacks"
    }


def test_a_cache_of_the_hub(tmp_path, refused):
    """Names of revisions are the times; folders of hashes in `snapshots` link to `blobs`."""
    for member in MEMBERS:
        place = tmp_path / f"models--who--small-14m-seed{member}"
        (place / "refs").mkdir(parents=True)
        (place / ".no_exist").mkdir()
        for time in (*TIMES, "main"):
            name = hashlib.sha1(f"{member} {time}".encode()).hexdigest()
            blob = place / "blobs" / f"{name}64"
            write(blob.with_suffix(".safetensors"), weights(member, TIMES[time == 200]))
            blob.with_suffix(".safetensors").rename(blob)
            (place / "refs" / (time if time == "main" else f"step{time}")).write_text(name)
            (place / "snapshots" / name).mkdir(parents=True)
            link = place / "snapshots" / name / "model.safetensors"
            link.symlink_to(f"../../blobs/{blob.name}")
    (tmp_path / "version.txt").write_text("1")
    recording = esl.recordings.read(tmp_path)
    np.testing.assert_array_equal(recording.positions, POSITIONS)
    np.testing.assert_array_equal(recording.times, TIMES)
    chosen = esl.recordings.read(tmp_path, name="step{}")
    np.testing.assert_array_equal(chosen.positions, POSITIONS)
    shutil.rmtree(place / "snapshots" / name)
    np.testing.assert_array_equal(esl.recordings.read(tmp_path).positions, POSITIONS)
    shutil.rmtree(place / "snapshots" / (place / "refs" / "step200").read_text())
    refused(lambda: esl.recordings.read(tmp_path), "snapshots/.* gives: No such file")


@pytest.mark.parametrize(
    ("outer", "inner", "swapped"),
    [
        ("step{}", "seed{}", True),
        ("checkpoint-{}", "replica_{}/model.safetensors", True),
        ("epoch_{}", "model_{}", True),
        ("seed{}", "step{}", False),
        ("run_{}", "model_{}", False),
        ("{}", "{}", False),
    ],
)
def test_times_with_members_in_them_are_refused(outer, inner, swapped, tmp_path, refused):
    for member in MEMBERS:
        for time in TIMES:
            path = tmp_path / outer.format(member) / inner.format(time)
            write(path if path.suffix else path.with_suffix(".npz"), weights(member, time))
    named = f"{outer}/{inner.partition('/')[0]}"
    if swapped:
        refused(lambda: esl.recordings.read(tmp_path), "reads as a member at a time")
    else:
        np.testing.assert_array_equal(esl.recordings.read(tmp_path).positions, POSITIONS)
    recording = esl.recordings.read(tmp_path, name=named)
    np.testing.assert_array_equal(recording.positions, POSITIONS)


def test_items_of_orbax(tmp_path, refused):
    optimizer = optax.adam(1e-3)

    def tree(member, time):
        return {key.replace(".", "_"): jnp.asarray(a) for key, a in weights(member, time).items()}

    def state(member, time):
        params = tree(member, time)
        of = train_state.TrainState.create(apply_fn=None, params=params, tx=optimizer)
        return {"default": ocp.args.StandardSave(of)}

    def apart(member, time):
        params = tree(member, time)
        return {
            "params": ocp.args.StandardSave(params),
            "opt_state": ocp.args.StandardSave(optimizer.init(params)),
            "notes": ocp.args.JsonSave({"loss": 1}),
        }

    def twice(member, time):
        params = ocp.args.StandardSave(tree(member, time))
        return {"generator": params, "critic": params}

    for form in (state, apart, twice):
        for member in MEMBERS:
            folder = (tmp_path / form.__name__ / f"member_{member}").resolve()
            with ocp.CheckpointManager(folder) as manager:
                for time in TIMES:
                    manager.save(time, args=ocp.args.Composite(**form(member, time)))
                manager.wait_until_finished()
    for form in (state, apart):
        recording = esl.recordings.read(tmp_path / form.__name__)
        np.testing.assert_array_equal(recording.positions, POSITIONS)
        assert list(recording.keys) == ["params/layer_bias", "params/layer_weight"]
        assert recording.left_out["opt_state/0/count"] == "state of an optimizer"
    shutil.rmtree(tmp_path / "apart" / "member_1" / "200" / "params")
    refused(lambda: esl.recordings.read(tmp_path / "apart"), "member_1/200 lacks its item `params`")
    refused(
        lambda: esl.recordings.read(tmp_path / "twice"),
        r"once \(choose by only='critic/\*', or take all by only='\*'\), but .* `critic`, `gen",
    )
    chosen = esl.recordings.read(tmp_path / "twice", only="generator/*")
    np.testing.assert_array_equal(chosen.positions, POSITIONS)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("step_{}.h5", "step_100.h5 is of the format .h5"),
        ("step_{}/pytorch_model.bin", "pytorch_model.bin may be a pickle"),
        ("checkpoint_{}", "no .npz, .safetensors or Orbax folder .*; it holds checkpoint_100, "),
        ("step_{}/notes.txt", "step_100 is none or is incomplete; it holds notes.txt"),
        (
            "../step_{}.npz",
            r"a folder of its own, .* holds 2 checkpoints, such as step_1",
        ),
        ("model-{}-of-00200.safetensors", "holds 2 checkpoints, such as member_0, outside of the "),
    ],
)
def test_other_layouts_are_one_sentence(file, sentence, tmp_path, refused):
    for member in MEMBERS:
        (tmp_path / "run" / f"member_{member}").mkdir(parents=True)
        for time in TIMES:
            path = tmp_path / "run" / f"member_{member}" / file.format(time)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"\x80\x04.")
    if file.startswith(".."):
        for member in MEMBERS:
            (tmp_path / "run" / f"member_{member}").rmdir()
    refused(lambda: esl.recordings.read(tmp_path / "run"), sentence)


@pytest.mark.parametrize(
    "name", ["checkpoints/step_{}.npz", "step_{}/weights.npz", "step_{}/model/weights.safetensors"]
)
def test_folders_between_are_read(name, tmp_path):
    np.testing.assert_array_equal(
        esl.recordings.read(save(tmp_path, name=name)).positions, POSITIONS
    )


# Arrays of a file


def test_arrays_of_other_names_are_refused(tmp_path, refused):
    positions = np.random.default_rng(0).normal(size=(3, 4, 2))
    for save_as, path in (
        (np.savez, tmp_path / "run.npz"),
        (lambda path, **a: zarr.save_group(str(path), zarr_format=3, **a), tmp_path / "run.zarr"),
    ):
        save_as(path, positions=positions, time=np.array([0, 1, 5]))
        refused(
            lambda path=path: esl.recordings.read(path),
            r"no other arrays than .*, but .* holds `time` \(did you mean `times`\?\)",
        )
        assert esl.recordings.read(path, skip="time").times is None
        refused(lambda path=path: esl.recordings.read(path, skip="tims"), "`skip` must match keys")
        refused(lambda path=path: esl.recordings.read(path, name="a_{}"), "choose checkpoints in a")
    np.savez(tmp_path / "matrix.npz", matrix=np.eye(2), scale=np.ones(2))
    refused(
        lambda: esl.recordings.read_matrix(tmp_path / "matrix.npz"),
        "`project` must hold no other arrays than `matrix`, but .* holds `scale`",
    )


@pytest.mark.parametrize("dtype", [">f4", ">f8", "f2", ">i4", "i8", "longdouble"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_orders_of_files(dtype, order, tmp_path):
    whole = np.arange(24).reshape(3, 4, 2) - 5
    np.savez(tmp_path / "run.npz", positions=np.asarray(whole, dtype, order=order))
    np.save(tmp_path / "run.npy", np.asarray(whole, dtype, order=order))
    for name in ("run.npz", "run.npy"):
        positions = esl.recordings.read(tmp_path / name).positions
        np.testing.assert_array_equal(positions, whole)
        assert positions.dtype == np.dtype(dtype).newbyteorder("=")
    if np.dtype(dtype).kind == "f":

        def make(member, time):
            return {"w": np.asarray(whole[0] + member + time, dtype, order=order)}

        positions = esl.recordings.read(save(tmp_path / "folder", make)).positions
        np.testing.assert_array_equal(positions[1, 1], np.ravel(whole[0] + 201))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_types_of_eight_bits(dtype, tmp_path, refused):
    def make(member, time):
        return {"w": np.array([1.5, -2, member], dtype)}

    def read(suffix):
        return esl.recordings.read(save(tmp_path / suffix, make, "step_{}." + suffix))

    np.testing.assert_array_equal(read("safetensors").positions[0, 1], [1.5, -2, 1])
    refused(lambda: read("npz"), "be arrays of a type that NumPy has .*, but `w` of ")


# Absent or damaged


@pytest.mark.parametrize("shards", [None, (3, 4, 2)])
def test_chunks_that_are_missing_are_not_zero(shards, tmp_path, refused):
    positions = np.random.default_rng(0).normal(size=(3, 4, 2))

    def stored(values, **more):
        group = zarr.open_group(str(tmp_path / "run.zarr"), mode="w", zarr_format=3)
        shape = {"shape": (3, 4, 2), "chunks": (1, 4, 2), "shards": shards, "dtype": values.dtype}
        group.create_array("positions", **shape, **more)[...] = values
        return esl.recordings.read(tmp_path / "run.zarr").positions

    np.testing.assert_array_equal(stored(positions), positions)
    positions[1] = 0
    refused(lambda: stored(positions), r"`positions` of .* lacks the chunk at index \(1, 0, 0\)")
    whole = stored(positions, config={"write_empty_chunks": True})
    np.testing.assert_array_equal(whole, positions)
    positions[1] = np.nan
    np.testing.assert_array_equal(stored(positions), positions)
    chunks = [path for path in (tmp_path / "run.zarr").rglob("c/**/*") if path.is_file()]
    chunks[0].unlink()
    refused(lambda: esl.recordings.read(tmp_path / "run.zarr"), "lacks the chunk at index")


def head(shape):
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (head((10**6, 10**3, 10**3)), "fit into the memory of this machine, .* 8e.03 GB"),
        (head((3, 4, 1)) + bytes(192), "declares 96 bytes and holds 192"),
        (head((-3, 4, 2)) + bytes(192), r"it declares the shape \(-3, 4, 2\)"),
    ],
)
def test_what_an_entry_declares_is_what_it_holds(entry, sentence, tmp_path, refused):
    with zipfile.ZipFile(tmp_path / "run.npz", "w") as archive:
        archive.writestr("positions.npy", entry)
    refused(lambda: esl.recordings.read(tmp_path / "run.npz"), sentence)
    (tmp_path / "run.npy").write_bytes(entry)
    refused(lambda: esl.recordings.read(tmp_path / "run.npy"), sentence)


def test_declared_sizes_are_held_against_memory(tmp_path, refused):
    group = zarr.open_group(str(tmp_path / "run.zarr"), mode="w", zarr_format=3)
    group.create_array("positions", shape=(10**5, 10**4, 10**3), dtype="f8", chunks=(1, 1, 1000))
    refused(lambda: esl.recordings.read(tmp_path / "run.zarr"), "declares 8e.03 GB")
    save(tmp_path / "folder", name="step_{}.safetensors")
    entries = 2 * 10**12
    stated = {"w": {"dtype": "F32", "shape": [entries], "data_offsets": [0, 4 * entries]}}
    text = json.dumps(stated).encode()
    for path in (tmp_path / "folder").rglob("*.safetensors"):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + 4 * entries)  # a file with a hole
    refused(lambda: esl.recordings.read(tmp_path / "folder"), "declares .* GB")


def test_one_array_twice_is_refused(tmp_path, refused):
    with zipfile.ZipFile(tmp_path / "run.npz", "w") as archive:
        for name in ("positions.npy", "positions"):
            archive.writestr(name, head((1, 1, 1)) + bytes(8))
    refused(lambda: esl.recordings.read(tmp_path / "run.npz"), "holds `positions` twice")


def test_a_key_of_jax_is_left_out(tmp_path):
    for member in MEMBERS:
        for time in TIMES:
            tree = {**weights(member, time), "rng": jax.random.key(0)}
            folder = (tmp_path / f"member_{member}" / f"step_{time}").resolve()
            ocp.PyTreeCheckpointer().save(folder, tree)
    recording = esl.recordings.read(tmp_path)
    np.testing.assert_array_equal(recording.positions, POSITIONS)
    assert recording.left_out == {"rng": "random streams"}
