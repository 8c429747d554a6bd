// What gemv_packed.wgsl needs of each matrix, _0; repeated for the others. BINDING_i are its bindings.

@group(0) @binding(BINDING_0) var<storage, read> main_0: array<vec4<u32>>;
@group(0) @binding(BINDING_1) var<storage, read> aux_0: array<u32>;
// unroll i BIAS
@group(0) @binding(BINDING_2) var<storage, read> bias_0: array<vec4<f32>>;
// end
// unroll i OUT
@group(0) @binding(BINDING_3) var<storage, read_write> out_0: array<vec4<f32>>;
// end
