// A team is a subgroup of TEAM lanes: sums need no memory. For adapters whose subgroups have one size.

fn team_sum(x: f32, tid: u32) -> f32 {
    return subgroupAdd(x);
}

// The sum over the workgroup, for all; one barrier, so no two of them without another in between.
fn group_sum(x: f32, tid: u32, team: u32, lane: u32) -> f32 {
    let sum = subgroupAdd(x);
    if lane == 0u {
        shared_sums[team] = sum;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < TEAMS; i++) {
        total += shared_sums[i];
    }
    return total;
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(local_invocation_index) tid: u32,
    @builtin(subgroup_id) team: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    run(wg, tid, team, lane);
}
