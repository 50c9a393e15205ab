from malaria_ray.cli import main

raise SystemExit(main())
