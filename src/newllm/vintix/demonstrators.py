"""Scripted demonstrators: for each kind of environment, the action of somebody who knows the hidden parameters.

All are pure functions: observation (n, do), parameters (n, k), options → action (n, da) inside the action box.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def point_reacher(observation: np.ndarray, goals: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Heads for the goal as fast as can still be braked, v = √(2·a·distance), slower when near: `gain`·distance."""
    position, velocity = observation[:, :2], observation[:, 2:]
    gap = goals - position
    distance = np.linalg.norm(gap, axis=1, keepdims=True)
    speed = np.minimum(options["gain"] * distance, np.sqrt(2 * options["acceleration"] * distance))
    wanted = gap / np.maximum(distance, 1e-9) * speed
    return np.clip((wanted - (1 - options["damping"]) * velocity) / options["acceleration"], -1, 1)


def reacher(observation: np.ndarray, goals: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Inverse kinematics of the two links, then a critically damped PD on the joint angles.

    The armature of 1 outweighs the links' inertia, so that each joint obeys q'' = gear·u − damping·q' nearly alone.
    """
    links, stiffness = options["links"], options["stiffness"]
    angles, velocity = np.arctan2(observation[:, 2:4], observation[:, :2]), observation[:, 4:]
    reach = np.clip(np.linalg.norm(goals, axis=1), abs(links[0] - links[1]), sum(links))
    elbow = np.arccos(np.clip((reach**2 - links[0] ** 2 - links[1] ** 2) / (2 * links[0] * links[1]), -1, 1))
    elbow = np.minimum(elbow, options["elbow_limit"]) * np.where(angles[:, 1] < 0, -1, 1)  # the side it bends to now
    shoulder = np.arctan2(goals[:, 1], goals[:, 0]) - np.arctan2(
        links[1] * np.sin(elbow), links[0] + links[1] * np.cos(elbow)
    )
    turn = np.stack([_wrapped(shoulder - angles[:, 0]), elbow - angles[:, 1]], axis=1)
    damping = 2 * np.sqrt(stiffness) - options["joint_damping"]
    return np.clip((stiffness * turn - damping * velocity) / options["gear"], -1, 1)


def pendulum(observation: np.ndarray, parameters: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Pumps energy until it is that of standing upright; holds there by a critically damped PD with gravity taken out.

    Gymnasium's rod: I·θ'' = ½·m·g·l·sin θ + u with I = m·l²/3, θ = 0 upright.
    """
    gravity, length, mass = parameters.T
    cosine, sine, velocity = observation.T
    angle = np.arctan2(sine, cosine)
    inertia, weight = mass * length**2 / 3, mass * gravity * length / 2
    missing = weight * (1 - cosine) - inertia * velocity**2 / 2
    limit = options["torque_limit"]
    pump = np.clip(options["pump_gain"] * missing / weight, -1, 1) * np.where(velocity < 0, -limit, limit)
    stiffness = options["stiffness"]
    hold = -weight * sine - inertia * (stiffness * angle + 2 * np.sqrt(stiffness) * velocity)
    near = (np.abs(angle) < options["hold_angle"]) & (np.abs(hold) < options["hold_torque"] * limit)
    return np.clip(np.where(near, hold, pump), -limit, limit)[:, None]


def inverted_pendulum(observation: np.ndarray, parameters: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Linear feedback on cart position, pole angle and their velocities."""
    limit = options["force_limit"]
    return np.clip(observation @ np.array(options["feedback"], dtype=float), -limit, limit)[:, None]


def _wrapped(angle: np.ndarray) -> np.ndarray:
    """The same angle in [−π, π)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
