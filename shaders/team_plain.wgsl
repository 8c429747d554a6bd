// A team is TEAM adjacent lanes of a workgroup, which sum by way of its memory.

fn team_sum(x: f32, tid: u32) -> f32 {
    let lane = tid % TEAM;
    workgroupBarrier();
    shared_sums[tid] = x;
    workgroupBarrier();
    for (var step = TEAM / 2u; step > 0u; step /= 2u) {
        if lane < step {
            shared_sums[tid] += shared_sums[tid + step];
        }
        workgroupBarrier();
    }
    return shared_sums[tid - lane];
}

// The sum over the workgroup, for all.
fn group_sum(x: f32, tid: u32, team: u32, lane: u32) -> f32 {
    workgroupBarrier();
    shared_sums[tid] = x;
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < WG; i++) {
        total += shared_sums[i];
    }
    return total;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    run(wg, tid, tid / TEAM, tid % TEAM);
}
