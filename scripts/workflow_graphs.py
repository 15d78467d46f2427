"""The example workflows, each written once: nodes, links, texts and the columns they stand in.

`python scripts/workflows.py write` makes the files in workflows/ from this. An input that is not named here
has its node's default.
"""

from __future__ import annotations

from collections.abc import Callable

from workflow_layout import Graph, Node

PICTURE = "example.png"  # in ComfyUI's input folder from the start
CLIP = "lance_example.mp4"  # put there by the pack when ComfyUI starts
IMAGE, VIDEO = "Lance_3B", "Lance_3B_Video"

# Outputs by number: of Lance Loader, Lance Text Encode, Lance Vision Encode and the decoders.
MODEL, LANCE, VAE = range(3)
POSITIVE, NEGATIVE = range(2)
VISION, LATENT = range(2)
IMAGES, FRAMES_AS_VIDEO = range(2)

MODELS = """
### {title}

**Models**, from [bytedance-research/Lance](https://huggingface.co/bytedance-research/Lance) on Hugging Face:

- `models/lance/{checkpoint}/` (the folder)
- `models/lance/Qwen2.5-VL-ViT/` (the folder)
- `models/lance/Wan2.2_VAE.pth` (the file)

{text}
"""

CHOOSE = (
    "**Choose a clip** in *Load Video*; the one that is there, a balloon over hills, comes with these nodes."
)

MAKERS: dict[str, Callable[[Graph], None]] = {}
TITLES: dict[str, str] = {}


def workflow(
    name: str, title: str, checkpoint: str, text: str, first: str = "Model and picture"
) -> Callable[[Callable], Callable]:
    """Register what adds the nodes that follow the note and the loader, which stand in the group `first`."""

    def register(fill: Callable[[Graph, Node], None]) -> Callable:
        def make(graph: Graph) -> None:
            graph.group(first)
            graph.note(MODELS.format(title=title, checkpoint=checkpoint, text=text).strip())
            fill(graph, graph.add("LanceLoader", checkpoint=checkpoint))

        MAKERS[name], TITLES[name] = make, title
        return fill

    return register


def build(name: str, graph: Graph) -> Graph:
    """Fill `graph` with the workflow of that name."""
    MAKERS[name](graph)
    return graph


# -- what several have in common -----------------------------------------------------------------------------


def sample(graph: Graph, loader: Node, text: Node, latent: tuple, title: str = "", **settings) -> Node:
    """Lance Sampler with the released settings."""
    links = {"positive": text[POSITIVE], "negative": text[NEGATIVE], "latent": latent}
    return graph.add("LanceSampler", title, model=loader[MODEL], **links, **settings)


def finish(graph: Graph, loader: Node, sampled: Node, video: bool = False) -> None:
    """Decode and save."""
    decoded = graph.add("LanceVAEDecode", vae=loader[VAE], samples=sampled[0])
    graph.group("Result", 440)
    if video:
        graph.add(
            "SaveVideo",
            video=decoded[FRAMES_AS_VIDEO],
            filename_prefix=f"video/{graph.name}",
            format="auto",
            codec="auto",
        )
    else:
        graph.add("SaveImage", images=decoded[IMAGES], filename_prefix=graph.name)


def encode(graph: Graph, loader: Node, prompt: str, target: str, vision: Node | None = None) -> Node:
    """Lance Text Encode."""
    links = {"vision": vision[VISION]} if vision else {}
    return graph.add("LanceTextEncode", lance=loader[LANCE], prompt=prompt, target=target, **links)


def see(graph: Graph, loader: Node, role: str, resolution: str = "auto", **media: tuple) -> Node:
    """Lance Vision Encode; a question needs no VAE."""
    vae = {} if role == "question" else {"vae": loader[VAE]}
    return graph.add(
        "LanceVisionEncode", lance=loader[LANCE], role=role, resolution=resolution, **vae, **media
    )


def from_text(
    graph: Graph,
    loader: Node,
    prompt: str,
    target: str,
    size: str,
    aspect: str,
    frames: int,
    vision: Node | None = None,
) -> None:
    """Prompt and size, sampler, result: three groups."""
    if vision is None:
        graph.group("Prompt")
    text = encode(graph, loader, prompt, target, vision)
    latent = graph.add("EmptyLanceLatent", size=size, aspect=aspect, frames=frames)
    graph.group("Sampling")
    sampled = sample(graph, loader, text, latent[0])
    finish(graph, loader, sampled, target == "video")


def edit(graph: Graph, loader: Node, prompt: str, target: str, **media: tuple) -> None:
    """Source and instruction, sampler, result: three groups."""
    graph.group("What to change, and how")
    vision = see(graph, loader, "edit source", **media)
    text = encode(graph, loader, prompt, target, vision)
    graph.group("Sampling")
    sampled = sample(graph, loader, text, vision[LATENT])
    finish(graph, loader, sampled, target == "video")


def ask(graph: Graph, loader: Node, question: str, **media: tuple) -> None:
    """Vision, question, answer."""
    graph.group("What to look at")
    vision = see(graph, loader, "question", **media)
    graph.group("Question and answer")
    graph.after_run = "fixed"
    answer = graph.add("LanceUnderstand", lance=loader[LANCE], vision=vision[VISION], question=question)
    graph.group("Result", 440)
    graph.add("PreviewAny", source=answer[0])


# -- the workflows -------------------------------------------------------------------------------------------


@workflow(
    "lance_text_to_image",
    "Text to image",
    IMAGE,
    "**Then** write what you want to see and press Run. Sizes are in *Empty Lance Latent*; leave the "
    "negative prompt empty at first.",
    "Model",
)
def _t2i(graph: Graph, loader: Node) -> None:
    prompt = (
        "A ginger cat in a red knitted scarf sits on a wooden windowsill and holds a small chalkboard that "
        'reads "HELLO". '
        "Rain runs down the glass behind it, a warm lamp glows in the room, soft morning light, shallow "
        "depth of field."
    )
    from_text(graph, loader, prompt, "image", "image_768res", "1:1", 1)


@workflow(
    "lance_stock_sampler",
    "Text to image, KSampler",
    IMAGE,
    "**Stock** nodes do the rest: *ModelSamplingSD3* sets the shift, *KSampler* samples, *VAE Decode* "
    "decodes. Lance Sampler's guidance "
    "interval and renormalisation are not in KSampler: try a lower cfg if colours get too strong.",
    "Model",
)
def _stock(graph: Graph, loader: Node) -> None:
    prompt = (
        "A lighthouse on a rocky cliff above a stormy sea, painted in loose watercolor. Waves break into "
        "white spray, gulls circle the "
        "tower, dark clouds open to a strip of golden evening light on the horizon."
    )
    graph.group("Prompt")
    text = encode(graph, loader, prompt, "image")
    latent = graph.add("EmptyLanceLatent", size="image_768res", aspect="1:1", frames=1)
    graph.group("Sampling")
    shifted = graph.add("ModelSamplingSD3", model=loader[MODEL], shift=3.5)
    links = {"positive": text[POSITIVE], "negative": text[NEGATIVE], "latent_image": latent[0]}
    settings = {
        "seed": 42,
        "steps": 30,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    sampled = graph.add("KSampler", model=shifted[0], **links, **settings)
    decoded = graph.add("VAEDecode", samples=sampled[0], vae=loader[VAE])
    graph.group("Result", 440)
    graph.add("SaveImage", images=decoded[IMAGES], filename_prefix=graph.name)


@workflow(
    "lance_text_to_video",
    "Text to video",
    VIDEO,
    "**Then** write what happens and how the camera moves. 49 frames are 4 seconds; *video_360p* takes "
    "about half the time.",
    "Model",
)
def _t2v(graph: Graph, loader: Node) -> None:
    prompt = (
        "A small wooden sailing boat glides across a calm mountain lake at sunrise. Golden light spreads "
        "over the mist, gentle ripples "
        "follow the boat, and the camera moves slowly forward from behind it."
    )
    from_text(graph, loader, prompt, "video", "video_480p", "16:9", 49)


@workflow(
    "lance_image_to_video",
    "Image to video",
    VIDEO,
    "**Then** load a picture and write what happens in it. The picture stays the first frame; the video "
    "takes its shape.",
)
def _i2v(graph: Graph, loader: Node) -> None:
    prompt = (
        "The girl waves with both arms and smiles, her hair sways in the wind, and the white clouds drift "
        "slowly to the right. "
        "The camera stays still."
    )
    picture = graph.add("LoadImage", image=PICTURE)
    graph.group("What happens")
    text = encode(graph, loader, prompt, "video")
    latent = graph.add(
        "LanceImageToVideoLatent", vae=loader[VAE], start_image=picture[0], size="video_480p", frames=49
    )
    graph.group("Sampling")
    sampled = sample(graph, loader, text, latent[0])
    finish(graph, loader, sampled, True)


@workflow(
    "lance_image_edit",
    "Edit an image",
    IMAGE,
    "**Then** load a picture and write what shall change. The result has the picture's shape; the sampler's "
    "size comes from "
    "*Lance Vision Encode*.",
)
def _image_edit(graph: Graph, loader: Node) -> None:
    picture = graph.add("LoadImage", image=PICTURE)
    edit(
        graph,
        loader,
        "Change the pink dress to a deep blue one with white polka dots. Keep everything else as it is.",
        "image",
        image=picture[0],
    )


@workflow(
    "lance_video_edit",
    "Edit a video",
    VIDEO,
    f"{CHOOSE} Up to 6 seconds' worth of frames are taken from it.",
    "Model and clip",
)
def _video_edit(graph: Graph, loader: Node) -> None:
    clip = graph.add("LoadVideo", file=CLIP)
    edit(
        graph,
        loader,
        "Make it snow: large soft flakes fall through the whole scene and snow lies on the ground. Keep the "
        "movement as it is.",
        "video",
        video=clip[0],
    )


@workflow(
    "lance_subject_to_image",
    "Subject to image",
    IMAGE,
    "**Then** load a picture of who or what shall appear and describe the new scene. For more subjects add "
    "a second *Load Image* and "
    "*Lance Vision Encode* and connect the first one's vision to its *earlier*.",
)
def _subject_image(graph: Graph, loader: Node) -> None:
    prompt = (
        "The girl sits in a cozy library and reads a thick book beside a tall window, evening light, "
        "shelves full of books behind her, "
        "in the same hand-drawn style."
    )
    picture = graph.add("LoadImage", image=PICTURE)
    graph.group("Subject and scene")
    vision = see(graph, loader, "subject reference", "image_768res", image=picture[0])
    from_text(graph, loader, prompt, "image", "image_768res", "1:1", 1, vision)


@workflow(
    "lance_subject_to_video",
    "Subject to video",
    VIDEO,
    "**Then** load a picture of who or what shall appear and describe what happens. For more subjects add a "
    "second *Load Image* and "
    "*Lance Vision Encode* and connect the first one's vision to its *earlier*.",
)
def _subject_video(graph: Graph, loader: Node) -> None:
    prompt = (
        "The girl walks along a beach toward the camera, her hair moves in the wind and waves roll in "
        "behind her, "
        "in the same hand-drawn style."
    )
    picture = graph.add("LoadImage", image=PICTURE)
    graph.group("Subject and scene")
    vision = see(graph, loader, "subject reference", "video_480p", image=picture[0])
    from_text(graph, loader, prompt, "video", "video_480p", "16:9", 49, vision)


@workflow(
    "lance_image_question",
    "Ask about an image",
    IMAGE,
    "**Then** load a picture and ask. The answer is written on *Lance Understand* word by word.",
)
def _image_question(graph: Graph, loader: Node) -> None:
    picture = graph.add("LoadImage", image=PICTURE)
    ask(
        graph,
        loader,
        "What does this picture show? Describe the person, the clothes and the surroundings.",
        image=picture[0],
    )


@workflow(
    "lance_video_question",
    "Ask about a video",
    VIDEO,
    f"{CHOOSE} The answer is written on *Lance Understand* word by word.",
    "Model and clip",
)
def _video_question(graph: Graph, loader: Node) -> None:
    clip = graph.add("LoadVideo", file=CLIP)
    ask(graph, loader, "What happens in this video, from beginning to end?", video=clip[0])


@workflow(
    "lance_multi_turn_edit",
    "Edit in several turns",
    IMAGE,
    "**Three edits in a row** on one subject: each turn starts from the picture the turn before made. "
    "Changing a later prompt or "
    "seed runs only that turn and those after it. Copy a turn to go on.",
)
def _multi_turn(graph: Graph, loader: Node) -> None:
    picture = graph.add("LoadImage", image=PICTURE)[0]
    graph.after_run = "fixed"
    turns = (
        "Change the pink dress to a red one.",
        "Put a wide straw hat on her head.",
        "Turn the day into a starry night with a full moon.",
    )
    for number, prompt in enumerate(turns, 1):
        graph.group(f"Turn {number}")
        vision = see(graph, loader, "edit source", image=picture)
        text = encode(graph, loader, prompt, "image", vision)
        graph.column()
        sampled = sample(graph, loader, text, vision[LATENT], seed=41 + number)
        decoded = graph.add("LanceVAEDecode", vae=loader[VAE], samples=sampled[0])
        picture = decoded[IMAGES]
        graph.add("SaveImage", images=picture, filename_prefix=f"{graph.name}_{number}")


@workflow(
    "lance_best_of_n",
    "Best of eight",
    IMAGE,
    "**Eight pictures** are drawn at once and scored by the model itself against the text; the best two "
    "are saved. "
    "Set *batch_size* and *keep* as you like, and keep both texts the same.",
    "Model",
)
def _best_of_n(graph: Graph, loader: Node) -> None:
    prompt = "A red panda balances on a bamboo stalk and holds three yellow balloons, misty forest behind it."
    graph.group("Prompt")
    text = encode(graph, loader, prompt, "image")
    latent = graph.add("EmptyLanceLatent", size="image_768res", aspect="1:1", frames=1, batch_size=8)
    graph.group("Sampling")
    sampled = sample(graph, loader, text, latent[0])
    decoded = graph.add("LanceVAEDecode", vae=loader[VAE], samples=sampled[0])
    graph.group("The best", 440)
    best = graph.add("LanceScore", lance=loader[LANCE], image=decoded[IMAGES], text=prompt, keep=2)
    graph.add("SaveImage", images=best[0], filename_prefix=graph.name)


@workflow(
    "lance_chat_then_edit",
    "Talk, then edit",
    IMAGE,
    "**Two questions** about a picture, the second one after the first: what was said is not computed "
    "again. The "
    "second answer is the instruction of an edit.",
)
def _chat_then_edit(graph: Graph, loader: Node) -> None:
    picture = graph.add("LoadImage", image=PICTURE)
    graph.group("Talk")
    graph.after_run = "fixed"
    seen = see(graph, loader, "question", image=picture[0])
    first = graph.add(
        "LanceUnderstand",
        lance=loader[LANCE],
        vision=seen[VISION],
        question="What does this picture show, and what is its mood?",
    )
    graph.column()
    second = graph.add(
        "LanceUnderstand",
        lance=loader[LANCE],
        chat=first[1],
        question="Name one change that would make it more dramatic. Answer with the instruction alone.",
    )
    graph.group("Edit")
    vision = see(graph, loader, "edit source", image=picture[0])
    text = encode(graph, loader, second[0], "image", vision)
    graph.group("Sampling")
    finish(graph, loader, sample(graph, loader, text, vision[LATENT]))


@workflow(
    "lance_enhance_to_video",
    "Enhance, then video",
    VIDEO,
    "**Then** write a short wish: *Lance Enhance Prompt* writes it out as the model was trained, and "
    "shows what it "
    "wrote.",
    "Model",
)
def _enhance_to_video(graph: Graph, loader: Node) -> None:
    graph.group("Prompt")
    graph.after_run = "fixed"
    written = graph.add(
        "LanceEnhancePrompt", lance=loader[LANCE], wish="a fox runs through fresh snow", task="t2v"
    )
    graph.column()
    text = encode(graph, loader, written[0], "video")
    latent = graph.add("EmptyLanceLatent", size="video_480p", aspect="16:9", frames=49)
    graph.group("Sampling")
    finish(graph, loader, sample(graph, loader, text, latent[0]), True)


@workflow(
    "lance_first_and_last_frame",
    "First and last frame",
    VIDEO,
    "**Then** load two pictures and write what happens between them. The first stays the first frame, "
    "the second "
    "the last; the video takes the first one's shape.",
)
def _first_and_last(graph: Graph, loader: Node) -> None:
    first = graph.add("LoadImage", image=PICTURE)
    last = graph.add("LoadImage", image=PICTURE)
    graph.group("What happens")
    text = encode(graph, loader, "The girl turns around once and her hair swings with her.", "video")
    start = graph.add(
        "LanceImageToVideoLatent", vae=loader[VAE], start_image=first[0], size="video_480p", frames=49
    )
    both = graph.add("LanceKeyframes", vae=loader[VAE], latent=start[0], image=last[0], frame=-1)
    graph.group("Sampling")
    finish(graph, loader, sample(graph, loader, text, both[0]), True)


@workflow(
    "lance_minute_of_video",
    "A minute of video",
    VIDEO,
    "**Then** load a picture and write what happens, a line for each part of five seconds. Twelve lines "
    "are a "
    "minute. The picture is the first frame.",
)
def _minute(graph: Graph, loader: Node) -> None:
    lines = (
        "The girl looks around and smiles.",
        "She waves with both arms.",
        "The wind picks up and her hair moves.",
        "Clouds drift over the sky.",
        "She turns around slowly.",
        "She looks up at the sky.",
        "The light turns golden.",
        "The sun sets behind her.",
        "Stars appear in the dark sky.",
        "The moon rises.",
        "She points at a shooting star.",
        "She closes her eyes and smiles.",
    )
    picture = graph.add("LoadImage", image=PICTURE)
    graph.group("What happens")
    longer = graph.add(
        "LanceExtendVideo",
        model=loader[MODEL],
        lance=loader[LANCE],
        vae=loader[VAE],
        images=picture[0],
        prompts="\n".join(lines),
        frames=60,
    )
    graph.group("Result", 440)
    graph.add(
        "SaveVideo",
        video=longer[1],
        filename_prefix=f"video/{graph.name}",
        format="auto",
        codec="auto",
    )


@workflow(
    "lance_storyboard",
    "Storyboard",
    VIDEO,
    "**Two shots** with the subject of one picture: each is written out, drawn as a picture and goes on "
    "as a clip; "
    "both become one video. Copy a shot to go on, or write a script for `python -m lance_core story`.",
)
def _storyboard(graph: Graph, loader: Node) -> None:
    picture = graph.add("LoadImage", image=PICTURE)
    subject = see(graph, loader, "subject reference", "video_480p", image=picture[0])
    graph.after_run = "fixed"
    made: dict = {}
    for number, wish in enumerate(("The girl wakes up in a tent.", "She runs along the shore of a lake."), 1):
        graph.group(f"Shot {number}")
        links = {"lance": loader[LANCE], "image": picture[0]}
        written = graph.add("LanceEnhancePrompt", wish=wish, task="subject_image", **links)
        text = encode(graph, loader, written[0], "image", subject)
        graph.column()
        latent = graph.add("EmptyLanceLatent", size="video_480p", aspect="16:9", frames=1)
        drawn = sample(graph, loader, text, latent[0], seed=41 + number)
        shot = graph.add("LanceVAEDecode", vae=loader[VAE], samples=drawn[0])
        graph.column()
        clip = graph.add(
            "LanceExtendVideo",
            model=loader[MODEL],
            lance=loader[LANCE],
            vae=loader[VAE],
            images=shot[IMAGES],
            prompts=wish,
            frames=48,
            seed=41 + number,
            **made,
        )
        made = {"before": clip[0]}
    graph.group("Result", 440)
    graph.add(
        "SaveVideo",
        video=clip[1],
        filename_prefix=f"video/{graph.name}",
        format="auto",
        codec="auto",
    )
