-- Needs several results. How far the scores moved from the first: share called parasitized, mean, and the population
-- stability index over ten bins of the score (below 0.1 little, above 0.25 much).
WITH binned AS (
    SELECT results, least(floor(score * 10), 9) AS bin, count(*) AS n FROM predictions GROUP BY ALL
), share AS (
    SELECT results, bin, greatest(coalesce(n, 0) / sum(n) OVER (PARTITION BY results), 1e-4) AS share
    FROM (SELECT results, unnest(range(10)) AS bin FROM runs) LEFT JOIN binned USING (results, bin)
), whole AS (
    SELECT results, count(*) AS n_cells, avg(predicted_label) AS share_parasitized, avg(score) AS mean_score
    FROM predictions GROUP BY results
)
SELECT runs.results, whole.n_cells, whole.share_parasitized, whole.mean_score,
       whole.share_parasitized - base.share_parasitized AS share_moved,
       sum((share.share - of_base.share) * ln(share.share / of_base.share)) AS stability_index
FROM runs
JOIN whole USING (results)
JOIN share USING (results)
JOIN runs AS first ON first.number = 1
JOIN whole AS base ON base.results = first.results
JOIN share AS of_base ON of_base.results = first.results AND of_base.bin = share.bin
GROUP BY ALL
ORDER BY max(runs.number);
