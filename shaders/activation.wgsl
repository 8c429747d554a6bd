// The activation of a gated unit: 0 SiLU, 1 GELU in its tanh form, 2 ReLU. ACTIVATION is a constant.

fn activation(x: f32) -> f32 {
    if ACTIVATION == 0u {
        return x / (1.0 + exp(-x));
    }
    if ACTIVATION == 1u {
        // 0.5 (1 + tanh(z)) = 1 / (1 + e^-2z), which does not cancel.
        let twice = 2.0 * 0.7978846 * (x + 0.044715 * x * x * x);
        return x / (1.0 + exp(-twice));
    }
    return max(x, 0.0);
}
