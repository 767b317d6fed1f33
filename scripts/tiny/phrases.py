"""The ways in which every type of question is put."""

from __future__ import annotations

PHRASES: dict[str, tuple[str, ...]] = {
    "shape": (
        "What shape is this?",
        "What shape is it?",
        "Which shape is in the picture?",
        "What shape do you see?",
        "What is the shape in the picture?",
        "What shape is in the picture?",
    ),
    "shape_of": (
        "What shape is {colour}?",
        "Which shape is {colour}?",
        "What is the {colour} shape?",
    ),
    "colour": (
        "What colour is {target}?",
        "What color is {target}?",
        "Which colour is {target}?",
        "What is the colour of {target}?",
        "What is the color of {target}?",
    ),
    "colour_alone": (
        "What colour is this?",
        "What colour is it?",
        "What color is it?",
        "What color is this?",
    ),
    "size": (
        "Is {target} large or small?",
        "How big is {target}?",
        "What size is {target}?",
        "Is {target} small or large?",
    ),
    "place": (
        "Where is {target}?",
        "Where in the picture is {target}?",
        "In which part of the picture is {target}?",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes are in the picture?",
        "How many shapes do you see?",
        "Count the shapes.",
        "How many shapes?",
    ),
    "count_kind": (
        "How many {kinds} are there?",
        "How many {kinds}?",
        "How many {kinds} are in the picture?",
        "How many {kinds} do you see?",
        "Count the {kinds}.",
    ),
    "count_colour": (
        "How many {colour} shapes are there?",
        "How many shapes are {colour}?",
        "How many {colour} shapes are in the picture?",
        "How many {colour} shapes?",
    ),
    "exists": (
        "Is there {a_thing}?",
        "Is there {a_thing} in the picture?",
        "Do you see {a_thing}?",
        "Does the picture show {a_thing}?",
    ),
    "background": (
        "What colour is the background?",
        "What color is the background?",
        "What is the background?",
        "Which colour is the background?",
        "What is the colour of the background?",
    ),
    "contents": (
        "What is in the picture?",
        "What is in this picture?",
        "What do you see?",
        "What is this?",
        "What's in this picture?",
        "What does the picture show?",
        "What do you see in the picture?",
    ),
    "description": (
        "Describe the picture.",
        "Describe this picture.",
        "Please describe the picture.",
        "Describe the picture in detail.",
        "Describe what you see.",
    ),
    "compare_count": (
        "Which picture has more shapes?",
        "Which of the two pictures has more shapes?",
        "In which picture are there more shapes?",
        "Which one has more shapes?",
    ),
    "compare_colour": (
        "Are the two pictures the same colour?",
        "Are the two shapes the same colour?",
        "Do the two pictures have the same colour?",
        "Is the colour the same in both pictures?",
        "Are they the same color?",
    ),
    "compare_shape": (
        "Do the two pictures show the same shape?",
        "Is it the same shape in both pictures?",
        "Are the two shapes the same?",
        "Is the shape the same in both pictures?",
    ),
    "compare_contents": (
        "Compare the two pictures.",
        "What is in the two pictures?",
        "Describe the two pictures.",
        "Compare the pictures.",
    ),
    "video_shape": (
        "What shape is in the video?",
        "Which shape is in the video?",
        "What shape is this?",
        "What shape do you see?",
    ),
    "video_colour": (
        "What colour is the shape in the video?",
        "What colour is the shape?",
        "What color is the shape?",
        "What colour is it?",
    ),
    "video_motion": (
        "Which way does the shape move?",
        "Where does the shape go?",
        "In which direction does the shape move?",
        "How does the shape move?",
        "Which way does it move?",
    ),
    "video_description": (
        "What happens in the video?",
        "Describe the video.",
        "What is in the video?",
        "What do you see?",
        "What does the video show?",
    ),
}
"""Ways to ask; "picture" is sometimes put as "image"."""
