from bundle.monailabel.faces import main

main()
